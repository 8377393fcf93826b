"""A vision-language model behind an OpenAI-compatible server (vLLM, Ollama, llama.cpp, `transformers serve`)."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from libreflux.captioning.answers import Answer
from libreflux.captioning.asking import OpenPicture, Question, Take, Wording
from libreflux.captioning.endpoint import Client, ExchangeFailed, Reply, data_url
from libreflux.errors import DataError, RunError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try of a question that the server could not answer."""
MOST_WAIT = 120.0
"""Seconds that are waited at most because a server asks for it."""
SLOW = 2
"""Tries of a question for which the server takes too long."""
LOST = 3
"""Questions without an answer, one after the other, after which the server is taken to be lost; or pictures that it
refuses before it has answered anything."""
QUALITY = 90
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_CLOSED = (401, 403, 404, 405)
_AGAIN = "see what the server says, then run the command again: it goes on"


class _Unanswered(Exception):
    """The server had no answer to one question; `refused`: it will not have one, however often it is asked."""

    def __init__(self, told: str, refused: bool = False) -> None:
        super().__init__(told)
        self.refused = refused


def served_model(client: Client, wanted: str | None) -> str:
    """The model's name at the server: the one that is wanted, or the only one that it has.

    Raises:
        RunError: the server cannot be reached, wants a key, or has several models.
    """
    where = client.endpoint
    try:
        reply = client.exchange("GET", "/models")
    except ExchangeFailed as error:
        hint = "start the server, or correct the address"
        raise RunError(f"cannot be reached ({error})", where=where, hint=hint) from None
    if reply.status in (401, 403):
        raise _no_entry(client, reply)
    if wanted is not None:
        return wanted
    rows = reply.values.get("data")
    listed = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    names = [name for name in listed if isinstance(name, str)]
    if len(names) != 1:
        told = f"has {len(names)} models ({', '.join(names[:5])})" if names else "does not say which model it has"
        raise RunError(told, where=where, hint="name one with `model`; is the address complete, with its /v1?")
    return names[0]


class Server:
    """Asks an OpenAI-compatible server, several questions at once.

    Args:
        client: to the server.
        model: its name there.
        wording: how answers are written.
        open_picture: gives the pictures; they are sent as JPEG.
        together: questions that are under way at once.
    """

    def __init__(self, client: Client, model: str, wording: Wording, open_picture: OpenPicture, together: int) -> None:
        self._client, self._model, self._wording = client, model, wording
        self._open, self._together = open_picture, together
        self._stop = threading.Event()
        self._answered = False

    def answers(self, take: Take) -> Iterator[tuple[Question, Answer]]:
        """See `asking.Asker`.

        Raises:
            RunError: the server refuses all questions, wants a key, redirects, or has no answer to several in a row.
        """
        lost, held = 0, list[tuple[Question, Answer]]()
        pool = ThreadPoolExecutor(self._together, "caption")
        asked: dict[Future[Answer], Question] = {}
        try:
            while True:
                # Until there is one answer, a server that has none for several pictures is not asked more.
                goes_on = not held or (not lost and len({question.file for question, _ in held}) < LOST)
                while goes_on and len(asked) < self._together and (question := take()) is not None:
                    asked[pool.submit(self._answer, question)] = question
                if not asked:
                    if held:
                        raise RunError(held[-1][1].text, where=self._client.endpoint, hint=_AGAIN)
                    return
                done = wait(asked, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=lambda one: one.exception() is not None):  # what is there is not lost
                    question = asked.pop(future)
                    try:
                        answer = future.result()
                    except _Unanswered as error:
                        held.append((question, Answer(str(error), fault="server")))
                        lost += not error.refused
                        if lost >= LOST:
                            raise RunError(str(error), where=self._client.endpoint, hint=_AGAIN) from None
                    else:
                        if answer.fault != "unreadable":
                            self._answered, lost = True, 0
                        yield question, answer
                if self._answered:
                    yield from held
                    held.clear()
        finally:
            self._stop.set()
            self._client.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, question: Question) -> Answer:
        try:
            picture = self._open(question.file)
        except DataError as error:
            return Answer(error.what, fault="unreadable")
        held = io.BytesIO()
        picture.copy().save(held, "JPEG", quality=QUALITY)  # a copy: Pillow notes in a picture how it is being saved
        body = {
            "model": self._model,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url(held.getvalue())}},
                        {"type": "text", "text": question.prompt},
                    ],
                }
            ],
            "max_tokens": self._wording.max_tokens,
            "temperature": self._wording.temperature_of(question),
            "seed": self._wording.seed_of(question),
            "stream": False,
        }
        return self._persist(body)

    def _persist(self, body: Mapping[str, Any]) -> Answer:
        """Asks again while the server is busy, out of order or unreachable."""
        told, slow = "", 0
        for pause in (*WAITS, None):
            asked_for = None
            try:
                reply = self._client.exchange("POST", "/chat/completions", body)
                if (answer := self._read(reply)) is not None:
                    return answer
                asked_for = reply.wait
                told = f"answers {reply.status} ({reply.told or 'no text in it'})"
            except ExchangeFailed as error:
                told = f"gives no answer ({error})"
                slow += error.slow
            if pause is None or slow >= SLOW or self._stop.wait(min(max(pause, asked_for or 0), MOST_WAIT)):
                break
        raise _Unanswered(told)

    def _read(self, reply: Reply) -> Answer | None:
        """The answer in a reply; None where it is worth asking again."""
        if reply.status in _CLOSED:
            raise _no_entry(self._client, reply)
        if reply.status in _BUSY or reply.status >= 500:
            return None
        if reply.status >= 400:
            raise _Unanswered(f"answers {reply.status} ({reply.told})", refused=True)
        return answer_in(reply.values)


def answer_in(values: Mapping[str, Any]) -> Answer | None:
    """What a completion says; None where it is none."""
    try:
        choice = values["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str | None):
        return None
    if reason == "content_filter" or (isinstance(refusal, str) and refusal):
        return Answer(str(refusal or content or "the server's filter"), fault="refused")
    return Answer(content or "", cut=reason == "length")


def _no_entry(client: Client, reply: Reply) -> RunError:
    hints = {401: "set LIBREFLUX_API_KEY", 403: "set LIBREFLUX_API_KEY"}
    hint = hints.get(reply.status, "is the address complete, with its /v1, and the model's name right?")
    return RunError(f"answers {reply.status} ({reply.told})", where=client.endpoint, hint=hint)

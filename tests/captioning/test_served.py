"""Captions by a real server that answers well, wrongly, slowly, not at all, or elsewhere."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import libreflux
from libreflux.captioning import endpoint, server
from libreflux.data.sources import read_source
from libreflux.errors import OptionError, RunError
from libreflux.recipe import DataSource
from libreflux.workflows.caption import CaptionResult
from served import Asked, Said, says, serving

WORDS = {"short": "a plain square", "long": "A plain square. It has one colour.", "tags": "square, plain, colour"}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a server that is out of order."""
    monkeypatch.setattr(server, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.delenv(endpoint.KEY, raising=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.jpg", "sub/c.png"]):
        Image.new("RGB", (200, 100), (16 * index, 200, 96)).save(folder / name, quality=95)
    return folder


def well(asked: Asked, number: int) -> Said:
    """An answer that names its prompt and its picture's colour."""
    return says(f"{asked.prompt}: a square of red {asked.key[1][0]}")


def caption(photos: Path, url: str, **more: Any) -> CaptionResult:
    given: dict[str, Any] = {"captions": {"short": "S", "long": "L"}, "batch": 1, **more}
    return libreflux.caption(photos, endpoint=url, **given)


def rows(photos: Path) -> dict[str, dict[str, str]]:
    lines = (photos / "metadata.jsonl").read_text("utf-8").splitlines()
    return {row["file_name"]: row["captions"] for row in map(json.loads, lines)}


def test_captions_are_data_for_training(photos: Path) -> None:
    with serving(well) as served:
        made = caption(photos, served.url)
        again = caption(photos, served.url)
    assert (made.pictures, made.written, made.kept, list(made.failed), made.failures) == (3, 6, 0, [], None)
    assert (again.written, again.kept, len(served.asked)) == (0, 6, 6)
    assert rows(photos)["sub/c.png"] == {"short": "S: a square of red 2", "long": "L: a square of red 2"}
    samples, _ = read_source(DataSource(path=str(photos)))
    assert {(Path(one.file).name, one.kinds, one.captions) for one in samples} == {
        (name, ("short", "long"), (f"S: a square of red {red}", f"L: a square of red {red}"))
        for red, name in enumerate(["a.png", "b.jpg", "c.png"])
    }
    asked = served.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert (asked.body["model"], asked.body["max_tokens"], asked.body["temperature"]) == ("tiny", 300, 0.0)
    assert "Authorization" not in asked.headers
    assert Counter(one.key for one in served.asked).most_common(1)[0][1] == 1


def test_pictures_are_sent_smaller_and_never_larger(photos: Path) -> None:
    with serving(well) as served:
        caption(photos, served.url, side=64)
        caption(photos, served.url, side=4096, captions={"other": "O"})
    assert {one.picture.size for one in served.asked} == {(64, 32), (200, 100)}
    assert {one.picture.size for one in served.asked if one.prompt == "O"} == {(200, 100)}


def test_nothing_that_a_file_says_besides_its_picture_is_sent(photos: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret of EXIF"
    told: dict[str, Any] = {"comment": b"secret comment", "exif": exif, "xmp": b"<x>secret of XMP</x>", "dpi": (7, 7)}
    Image.new("RGB", (40, 40)).save(photos / "b.jpg", **told)
    assert (photos / "b.jpg").read_bytes().count(b"secret") == 3
    with serving(well) as served:
        page = caption(photos, served.url).page.read_text("utf-8")
    sent = [one.body["messages"][0]["content"][0]["image_url"]["url"] for one in served.asked]
    shown = [text.partition('"')[0] for text in page.split('src="')[1:]]
    for url in sent + shown:
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert picture.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert b"secret" not in base64.b64decode(url.partition(",")[2])


def test_a_useless_answer_is_asked_for_again_with_another_seed_and_listed_in_the_end(photos: Path) -> None:
    bad: dict[int, list[Said]] = {
        0: [says(""), says("I'm sorry, but I can't help."), says("a fox")],
        1: [says("in snow " * 30), says(None), says("a long", "length"), says("never")],
        2: [says("a b", "content_filter"), says([{"type": "text", "text": "a bear"}])],
    }
    seen: dict[int, list[dict[str, Any]]] = {}

    def answer(asked: Asked, number: int) -> Said:
        red = asked.key[1][0]
        seen.setdefault(red, []).append(asked.body)
        return bad[red][len(seen[red]) - 1]

    with serving(answer) as served:
        made = caption(photos, served.url, captions={"short": "S"})
        assert caption(photos, served.url, captions={"short": "S"}).failed == [("b.jpg", "short", "cut")]
        assert len(served.asked) == 8, "the same call does not ask again what it has no answer to"
        fresh = {red: list(said) for red, said in bad.items()}
        bad[1] = [*fresh[1][:3], says("a wolf")]
        assert caption(photos, served.url, captions={"short": "S"}, seed=1).failures is None
    assert (made.written, made.failed) == (2, [("b.jpg", "short", "cut")])
    assert made.failures is not None
    assert rows(photos) == {"a.png": {"short": "a fox"}, "b.jpg": {"short": "a wolf"}, "sub/c.png": {"short": "a bear"}}
    assert [body["temperature"] for body in seen[0]] == [0, 0.7, 0.7]
    assert len({body["seed"] for body in seen[0]}) == 3
    assert all(0 <= body["seed"] < 2**31 for body in seen[0])


def test_what_failed_is_in_the_list_and_on_the_page(photos: Path) -> None:
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    with serving(lambda asked, number: says("<b>hm</b> " * 20)) as served:
        made = caption(photos, served.url, captions={"short": "S"}, tries=2)
    assert (made.uncaptioned, made.written) == (4, 0)
    assert made.failures is not None
    listed = [json.loads(line) for line in made.failures.read_text("utf-8").splitlines()]
    assert [(row["file_name"], row["fault"], row["tries"]) for row in listed] == [
        ("a.png", "repeating", 2),
        ("b.jpg", "repeating", 2),
        ("broken.png", "unreadable", 1),
        ("sub/c.png", "repeating", 2),
    ]
    page = made.page.read_text("utf-8")
    assert "&lt;b&gt;hm&lt;/b&gt;" in page
    assert "<b>hm" not in page
    assert page.count("data:image/jpeg;base64") == 3
    assert not (photos / "metadata.jsonl").exists()
    (photos / "a.txt").write_text("by hand\n", encoding="utf-8")
    rows_by_hand = {"file_name": "b.jpg", "captions": {"short": "by hand"}}
    (photos / "metadata.jsonl").write_text(json.dumps(rows_by_hand), encoding="utf-8")
    with serving(well) as served:
        later = caption(photos, served.url, captions={"short": "S"}, tries=2)
    assert [row[0] for row in later.failed] == ["a.png", "broken.png", "sub/c.png"]
    assert (later.uncaptioned, later.kept, len(served.asked)) == (2, 1, 0)


@pytest.mark.parametrize(
    "trouble",
    [
        Said({"error": {"message": "busy"}}, 429, {"Retry-After": "0"}),
        Said({"error": "oops"}, 500),
        Said(raw=b"<html>bad gateway</html>", status=502),
        Said(raw=b'{"choices": [', status=200),
        Said({"choices": []}),
        Said({"choices": [{"message": "text"}]}),
        Said(raw=b"\xff\xfe", status=200),
        Said(raw=b'{"choices": [{"message": {"content": "\\ud83d"}}]}'),
        Said({"choices": "x"}, headers={"Content-Length": "9999"}),
    ],
    ids=["429", "500", "502", "cut JSON", "no choice", "odd message", "no UTF-8", "half a character", "cut short"],
)
def test_a_server_in_trouble_is_asked_again(photos: Path, trouble: Said) -> None:
    with serving(lambda asked, number: trouble if number < 2 else well(asked, number)) as served:
        made = caption(photos, served.url, captions={"short": "S"}, timeout=1)
    assert (made.written, len(served.asked)) == (3, 5)
    first = [one.body for one in served.asked[:3]]
    assert first[0] == first[1] == first[2], "it is the same question"


def test_a_server_that_stays_in_trouble_ends_the_run_which_goes_on_later(photos: Path) -> None:
    with (
        serving(lambda asked, number: well(asked, number) if number < 2 else Said({"error": "no disk"}, 503)) as served,
        pytest.raises(RunError, match=r"answers 503 \(no disk\).*goes on") as told,
    ):
        caption(photos, served.url, captions={"short": "S", "long": "L", "tags": "T"})
    assert served.url in str(told.value)
    assert rows(photos) == {"a.png": {"short": "S: a square of red 0", "long": "L: a square of red 0"}}
    with serving(well) as served:
        made = caption(photos, served.url, captions={"short": "S", "long": "L", "tags": "T"})
    assert (made.written, made.kept, len(served.asked), made.failures) == (7, 2, 7, None)


def test_one_question_that_the_server_never_answers_does_not_stop_the_others(photos: Path) -> None:
    with serving(
        lambda asked, number: Said({"detail": "bad image"}, 400) if asked.key[1][0] == 1 else well(asked, number)
    ) as served:
        made = caption(photos, served.url, captions={"short": "S"})
        assert (made.written, made.failed, len(served.asked)) == (2, [("b.jpg", "short", "server")], 3)
        caption(photos, served.url, captions={"short": "S"}, existing="overwrite", seed=2)
    assert made.failures is not None
    assert "answers 400 (bad image)" in made.failures.read_text("utf-8")


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_first_pictures_may_be_those_that_are_refused(photos: Path, batch: int) -> None:
    """Even if refusals come sooner than the first answer."""
    refused = Counter[int]()
    both = threading.Event()

    def answer(asked: Asked, number: int) -> Said:
        red = asked.key[1][0]
        if red < 2:
            refused[red] += 1
            if refused.total() == 4:
                both.set()
            return Said({"error": "bad image"}, 400)
        both.wait(5)
        return well(asked, number)

    with serving(answer) as served:
        made = caption(photos, served.url, batch=batch)
    assert (made.written, {row[0] for row in made.failed}, len(served.asked)) == (2, {"a.png", "b.jpg"}, 6)


@pytest.mark.parametrize(
    ("said", "told", "asked"),
    [
        (Said({"error": {"message": "unknown field seed"}}, 400), "answers 400 (unknown field seed)", 5),
        (Said({"error": {"message": "no model x"}}, 404), "answers 404 (no model x)", 1),
        (Said({"message": "who?"}, 401), "LIBREFLUX_API_KEY", 1),
        (
            Said(raw=b"", status=307, headers={"Location": "http://elsewhere.invalid/v1"}),
            "redirects to http://elsewhere",
            1,
        ),
    ],
    ids=["400", "404", "401", "redirect"],
)
def test_a_server_that_refuses_every_question_is_soon_asked_no_more(
    photos: Path, said: Said, told: str, asked: int
) -> None:
    """Of a refusal that may be the picture's fault: when it came for three pictures, here of two captions each."""
    with serving(lambda asked, number: said) as served, pytest.raises(RunError) as error:
        caption(photos, served.url)
    assert told in str(error.value)
    assert len(served.asked) == asked
    assert not (photos / "metadata.jsonl").exists()


def test_nobody_but_the_endpoint_is_contacted(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a proxy of the environment nor the place of a redirect."""
    reached: list[tuple[str, int]] = []
    real = socket.create_connection

    def connect(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
        reached.append(address)
        return real(address, *args, **kwargs)

    with serving(well) as other, serving(well) as served:
        monkeypatch.setattr(socket, "create_connection", connect)
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, other.url)
        caption(photos, served.url)
        elsewhere = Said(raw=b"", status=302, headers={"Location": f"{other.url}/chat/completions"})
        with serving(lambda asked, number: elsewhere) as turning, pytest.raises(RunError, match="not followed"):
            caption(photos, turning.url, existing="overwrite", seed=5)
    assert {f"http://{host}:{port}/v1" for host, port in reached} == {served.url, turning.url}
    assert not other.asked
    assert not other.listed


def _always(message: str) -> Callable[[Asked, int], Said]:
    return lambda asked, number: Said({"error": {"message": message}}, 403)


def test_the_key_is_sent_and_shown_nowhere(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-VERY-secret-123"
    monkeypatch.setenv(endpoint.KEY, key)
    caplog.set_level(logging.DEBUG)
    with serving(well) as served:
        caption(photos, served.url)
    assert {one.headers["Authorization"] for one in served.asked} == {f"Bearer {key}"}
    refused = Said({"error": {"message": f"bad key {key}"}}, 403)
    with serving(lambda asked, number: refused) as served, pytest.raises(RunError) as error:
        caption(photos, served.url, existing="overwrite", seed=3)
    assert "bad key …" in str(error.value)
    for middle in (" " * 180, "x" * 180):  # a long message is cut, the key in it not
        with serving(_always(f"bad{middle}key {key}{middle}")) as served, pytest.raises(RunError) as error:
            caption(photos, served.url, existing="overwrite", seed=3)
        assert key[:4] not in str(error.value)
        assert key[-4:] not in str(error.value)
    written = [path.read_bytes() for path in photos.rglob("*") if path.is_file()]
    assert all(key.encode() not in data for data in written)
    assert key not in caplog.text
    monkeypatch.setenv(endpoint.KEY, f"{key}\nX-Other: 1")
    with serving(well) as served, pytest.raises(OptionError) as told:
        caption(photos, served.url)
    assert key not in str(told.value)
    assert not served.asked


def test_a_slow_server_is_given_up_in_time(photos: Path) -> None:
    gone = threading.Event()

    def slowly(asked: Asked, number: int) -> Said:
        gone.wait(60)
        return says("late")

    with serving(slowly) as served:
        with pytest.raises(RunError, match="it took too long"):
            caption(photos, served.url, timeout=1)
        assert len(served.asked) == 2
        assert not gone.is_set()
        gone.set()


def test_a_server_that_is_not_there(photos: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RunError, match=r"cannot be reached.*start the server"):
        caption(photos, f"http://127.0.0.1:{port}/v1", model="x")


def test_which_model_is_asked(photos: Path) -> None:
    with serving(well, Said({"data": [{"id": "one"}, {"id": "two"}]})) as served:
        with pytest.raises(RunError, match=r"has 2 models \(one, two\)"):
            caption(photos, served.url)
        caption(photos, served.url, model="two")
    assert {one.body["model"] for one in served.asked} == {"two"}
    with serving(well, Said({}, 404)) as served, pytest.raises(RunError, match="which model"):
        caption(photos, served.url)


def test_questions_are_under_way_together(photos: Path) -> None:
    meet = threading.Barrier(3, timeout=8)

    def together(asked: Asked, number: int) -> Said:
        meet.wait()  # fails unless three are here at once
        return well(asked, number)

    with serving(together) as served:
        made = caption(photos, served.url, batch=3)
    assert made.written == 6
    assert rows(photos)["a.png"] == {"short": "S: a square of red 0", "long": "L: a square of red 0"}

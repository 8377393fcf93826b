"""The place of an OpenAI-compatible server, and one exchange with it. Nothing else is ever contacted.

Python's own client is used: it knows no proxy, follows no redirect, and is there whatever huggingface_hub brings with
it (httpx up to 1.x, httpx2 since).
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from libreflux import plainjson
from libreflux.errors import OptionError, RunError
from libreflux.printing import shortened

KEY = "LIBREFLUX_API_KEY"
"""The environment's variable that has the key, for servers that want one."""
CONNECTING = 10.0
"""Seconds until a server takes a call."""
MOST_BYTES = 2**23
"""Of one reply."""
_CALL = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """Where a server is.

    Attributes:
        secure: https.
        host, port, path: of its API; the path without a "/" at its end.
    """

    secure: bool
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path}"

    @staticmethod
    def parse(text: str) -> Endpoint:
        """The endpoint that a user names, e.g. `http://127.0.0.1:8000/v1`.

        Raises:
            OptionError: it is none, or has a password or key in it, which would be shown with it.
        """
        hint = "write it like http://127.0.0.1:8000/v1"
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:  # its words have the address in them, with what may be a password
            raise OptionError("is no address, or its port is no number", "endpoint", hint=hint) from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            told = f"set {KEY} in the environment, which is sent as a bearer token"
            raise OptionError("may have no user, password, ? or # in it", "endpoint", hint=told)
        plain = text.isascii() and text.isprintable() and " " not in text
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise OptionError(f"{shortened(text, 80)!r} is no address", "endpoint", hint=hint)
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix(_CALL)
        return Endpoint(secure, parts.hostname, (443 if secure else 80) if port is None else port, path)


@dataclass(frozen=True)
class Reply:
    """What a server said.

    Attributes:
        status: of HTTP.
        values: of its JSON, where it is a mapping; else empty.
        told: the server's own words of an error, shortened; else why its reply is no JSON.
        wait: seconds after which it wants to be asked again; None where it does not say.
    """

    status: int
    values: Mapping[str, Any]
    told: str
    wait: float | None


class ExchangeFailed(Exception):
    """An exchange that came to no reply; `slow`: because time ran out."""

    def __init__(self, told: str, slow: bool = False) -> None:
        super().__init__(told)
        self.slow = slow


def own_key() -> str | None:
    """The key in the environment; None where there is none.

    Raises:
        OptionError: one that cannot be sent. It is not shown.
    """
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(f"the environment's {KEY} is no key", None, hint="set it to letters, digits and signs alone")
    return key or None


class Client:
    """Exchanges with one endpoint, from any number of threads.

    Args:
        endpoint: the server.
        key: sent with each call, and shown nowhere; None: none is sent.
        timeout: seconds that one reply may take.
    """

    def __init__(self, endpoint: Endpoint, key: str | None, timeout: float) -> None:
        self.endpoint, self._key, self._timeout = endpoint, key, timeout
        self._open: set[socket.socket] = set()
        self._guard, self._closed = threading.Lock(), False

    def exchange(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """One call and its reply, on a connection of its own.

        Raises:
            ExchangeFailed: no connection, no reply in time, or one that is cut short or no HTTP.
            RunError: a redirect, which is not followed.
        """
        connection = self._connection()
        open_socket: socket.socket | None = None
        try:
            connection.connect()
            open_socket = connection.sock  # the connection forgets it when the reply's head is read
            open_socket.settimeout(self._timeout)
            with self._guard:
                if self._closed:
                    raise ExchangeFailed("stopped")
                self._open.add(open_socket)
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self.endpoint.path + path, data, self._headers(data))
            response = connection.getresponse()
            raw = self._body(response)
        except TimeoutError:
            raise ExchangeFailed("it took too long", slow=True) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last one of a host that is no name
            told = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ExchangeFailed(self._without_key(told)) from None
        finally:
            if open_socket is not None:
                with self._guard:
                    self._open.discard(open_socket)
            connection.close()
        return self._reply(response, raw)

    def close(self) -> None:
        """Ends all exchanges that are under way."""
        with self._guard:
            self._closed = True
            for open_socket in self._open:
                with contextlib.suppress(OSError):  # it has ended by itself
                    open_socket.shutdown(socket.SHUT_RDWR)

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.endpoint.secure else http.client.HTTPConnection
        return kind(self.endpoint.host, self.endpoint.port, timeout=min(CONNECTING, self._timeout))

    def _headers(self, data: bytes | None) -> dict[str, str]:
        headers = {"Accept": "application/json", "Connection": "close"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        return headers if self._key is None else {**headers, "Authorization": f"Bearer {self._key}"}

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        ends, parts, size = time.monotonic() + self._timeout, list[bytes](), 0
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise ExchangeFailed(f"its reply is longer than {MOST_BYTES >> 20} MiB")
            if time.monotonic() > ends:  # each part may come in time, and still they may never end
                raise TimeoutError
        return b"".join(parts)

    def _reply(self, response: http.client.HTTPResponse, raw: bytes) -> Reply:
        if 300 <= response.status < 400:
            to = shortened(self._without_key(response.headers.get("Location", "another place")), 100)
            hint = "name the address itself with `endpoint`, if you trust it"
            raise RunError(f"redirects to {to}, which is not followed", where=self.endpoint, hint=hint)
        text = raw.decode("utf-8", "replace")
        try:
            parsed = plainjson.parse(text)
            values = parsed if isinstance(parsed, dict) else {}
            told = "" if isinstance(parsed, dict) else "its reply is no JSON object"
        except ValueError:
            values, told = {}, "its reply is no JSON"
        error = values.get("error", values.get("message") or values.get("detail"))
        if error or response.status >= 400:
            words = error.get("message") if isinstance(error, dict) else error
            told = str(words or text.strip() or response.reason)
        return Reply(response.status, values, shortened(self._without_key(told), 200), _seconds(response.headers))

    def _without_key(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "…")


def data_url(jpeg: bytes) -> str:
    """A picture as servers take it."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


def _seconds(headers: Any) -> float | None:
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return None  # a date, or nothing

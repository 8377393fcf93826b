"""A real HTTP server in a thread that answers as its test says, and keeps what it was asked."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Asked:
    """A request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][0]["content"][1]["text"])

    @property
    def picture(self) -> Image.Image:
        url = self.body["messages"][0]["content"][0]["image_url"]["url"]
        kind, _, data = url.partition(",")
        assert kind == "data:image/jpeg;base64"
        return Image.open(io.BytesIO(base64.b64decode(data)))

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Which caption of which picture: of one colour each."""
        pixel = self.picture.convert("RGB").getpixel((0, 0))
        assert isinstance(pixel, tuple)
        return self.prompt, tuple(round(value / 16) for value in pixel)


@dataclass
class Said:
    """A response; `raw` instead of JSON where it is given."""

    values: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None


def says(text: object, reason: str = "stop") -> Said:
    return Said({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]})


@dataclass
class Served:
    """Its address, and all that came."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    listed: int = 0


@contextmanager
def serving(answer: Callable[[Asked, int], Said], models: Said | None = None) -> Iterator[Served]:
    """Serves until the block ends; `answer` gets each request and its number from 0."""
    guard = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.listed += 1
            self.respond(models or Said({"data": [{"id": "tiny"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, dict(self.headers), body)
            with guard:
                number = len(served.asked)
                served.asked.append(asked)
            self.respond(answer(asked, number))

        def respond(self, said: Said) -> None:
            data = said.raw if said.raw is not None else json.dumps(said.values).encode()
            try:
                self.send_response(said.status)
                for name, value in {"Content-Length": str(len(data)), **said.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                return  # who asked has gone

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

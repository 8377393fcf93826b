"""Hub ids, against a small hub of our own on this machine: what is fetched, what is not, and when."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves one repository, org/tiny, as the hub's HTTP interface does, and notes every request."""

    def __init__(self, folder: Path, extra: dict[str, bytes]) -> None:
        self.files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.files |= extra
        self.requests: list[str] = []
        self.failing = ""
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def fetched(self) -> set[str]:
        return {r.split(f"/resolve/{COMMIT}/")[1] for r in self.requests if r.startswith("GET") and "/resolve/" in r}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            files = self.server.files.items()
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.split(f"/resolve/{COMMIT}/")[1]
            if name == self.server.failing:
                self.answer(b"", 500)
            else:
                self.answer(self.server.files[name])
        else:
            self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = hashlib.sha256(body).hexdigest()
        own = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        for name, value in {**own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tiny_model_dir: Path) -> Iterator[Hub]:
    extra = {"transformer/evil.py": b"raise SystemExit", "pipeline.py": b"", "whole.safetensors": b"x" * 100}
    server = Hub(tiny_model_dir, extra)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def opened(hub: Hub, cache: Path, name: str) -> str:
    """What a fresh process says that opens the model: its folder, or the error."""
    code = (
        "import sys; from libreflux.errors import ModelError\n"
        "from libreflux.model.locate import locate\n"
        "try: print(locate(sys.argv[1]))\n"
        "except ModelError as error: print('ModelError:', error)\n"
    )
    package = str(Path(__file__).resolve().parents[2] / "src")
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "PYTHONPATH": package}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_model_comes_once_without_code_and_after_interruption_in_full(hub: Hub, tmp_path: Path) -> None:
    hub.failing = "vae/diffusion_pytorch_model.safetensors"
    said = opened(hub, tmp_path, "org/tiny")
    assert said.startswith("ModelError: org/tiny: no folder of this name") and "\n" not in said

    hub.failing = ""  # the first attempt left a part of a model behind, which must not be taken for one
    folder = Path(opened(hub, tmp_path, "org/tiny@main"))
    assert folder.name == COMMIT
    wanted = {name for name in hub.files if name not in ("transformer/evil.py", "pipeline.py", "whole.safetensors")}
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} == wanted
    assert hub.fetched - {"vae/diffusion_pytorch_model.safetensors"} <= wanted

    hub.requests.clear()
    assert Path(opened(hub, tmp_path, "org/tiny")) == folder
    assert hub.requests == []  # the commit of the first download stays, without asking


def test_an_unknown_id_is_one_line(hub: Hub, tmp_path: Path) -> None:
    said = opened(hub, tmp_path, "org/none")
    assert said.startswith("ModelError: org/none: no folder of this name, and it cannot be had from the hub (")
    assert "mend: mend the path, or check the id" in said and "\n" not in said


def test_a_name_without_a_slash_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    assert "no such model: tiny" in opened(hub, tmp_path, "tiny")
    assert hub.requests == []

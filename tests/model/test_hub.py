"""Hub ids, against a small hub of our own on this machine: what is fetched, what is not, and when."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c0ffee" + "0" * 34
REFUSED = {  # what the hub answers to a repository or revision: status, X-Error-Code
    "org/gated": (403, "GatedRepo"),
    "org/login": (401, "GatedRepo"),
    "org/private": (401, "RepoNotFound"),
    "org/none": (404, "RepoNotFound"),
    "org/tiny/revision/gone": (404, "RevisionNotFound"),
    "org/broken": (500, ""),
}


class Hub(ThreadingHTTPServer):
    """Serves one repository, org/tiny, as the hub's HTTP interface does, and notes every request."""

    def __init__(self, folder: Path, extra: dict[str, bytes]) -> None:
        self.files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.files |= extra
        self.requests: list[str] = []
        self.failing = ""
        self.gated = False
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
        refusal = [answer for name, answer in REFUSED.items() if f"/{name}/" in f"{path}/"]
        if refusal:
            self.answer(b"", refusal[0][0], {"X-Error-Code": refusal[0][1]})
        elif path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            files = self.server.files.items()
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.split(f"/resolve/{COMMIT}/")[1]
            if self.server.gated:
                self.answer(b"", 403, {"X-Error-Code": "GatedRepo"})
            elif name == self.server.failing:
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


def opened(hub: Hub, cache: Path, name: str, port: int | None = None, call: str = "locate(sys.argv[1])") -> str:
    """What a fresh process says that opens the model: its folder, or the error. The hub may be said to be elsewhere."""
    code = (
        "import sys; from libreflux.errors import ModelError\n"
        "from libreflux.model.locate import locate, told_model\n"
        f"try: print({call})\n"
        "except ModelError as error: print('ModelError:', error)\n"
    )
    package = str(Path(__file__).resolve().parents[2] / "src")
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "PYTHONPATH": package}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{port or hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_model_comes_once_without_code_and_after_interruption_in_full(hub: Hub, tmp_path: Path) -> None:
    hub.failing = "vae/diffusion_pytorch_model.safetensors"
    said = opened(hub, tmp_path, "org/tiny")
    assert said.startswith("ModelError: org/tiny: no folder of this name")
    assert "\n" not in said

    hub.failing = ""  # the first attempt left a part of a model behind, which must not be taken for one
    folder = Path(opened(hub, tmp_path, "org/tiny@main"))
    assert folder.name == COMMIT
    wanted = {name for name in hub.files if name not in ("transformer/evil.py", "pipeline.py", "whole.safetensors")}
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} == wanted
    assert hub.fetched - {"vae/diffusion_pytorch_model.safetensors"} <= wanted

    hub.requests.clear()
    assert Path(opened(hub, tmp_path, "org/tiny")) == folder
    assert hub.requests == []  # the commit of the first download stays, without asking


def test_what_a_file_names_is_used_where_it_is_and_never_fetched(hub: Hub, tmp_path: Path) -> None:
    told = "told_model(sys.argv[1], 'a.png')"
    hub.requests.clear()
    said = opened(hub, tmp_path, "org/tiny", call=told)
    assert said.startswith("ModelError: a.png: its model org/tiny is not at hand (not downloaded before); hint: ")
    assert "name the model yourself with `model`" in said
    assert "\n" not in said
    for name in ("org/tiny@../../../x", "../org/tiny"):
        assert "not at hand (no such model" in opened(hub, tmp_path, name, call=told)
    assert hub.requests == []
    opened(hub, tmp_path, "org/tiny")  # the user's own word
    assert hub.fetched
    hub.requests.clear()
    assert opened(hub, tmp_path, "org/tiny", call=told) == "org/tiny"
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/gated", "its owner asks for a login and consent"),
        ("org/login", "its owner asks for a login and consent"),
        ("org/private", "no such model there, or a private one"),
        ("org/none", "no such model there, or a private one"),
        ("org/tiny@gone", "no such revision there"),
        ("org/broken", "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path, name: str, reason: str) -> None:
    said = opened(hub, tmp_path, name)
    assert said.startswith(f"ModelError: {name}: no folder of this name, and it cannot be had from the hub (")
    assert reason in said
    assert "; hint: correct the path, or check the id" in said
    assert "\n" not in said
    assert ("hf auth login" in said) == (name in ("org/gated", "org/login", "org/private"))


def test_a_gated_model_shows_its_list_of_files_and_no_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "gated", True)
    said = opened(hub, tmp_path, "org/tiny")
    assert said.startswith("ModelError: org/tiny: no folder of this name")
    assert "\n" not in said
    assert "(its owner asks for a login and consent); hint: " in said
    assert "log in with `hf auth login`" in said


def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = opened(hub, tmp_path, "org/tiny", port)
    assert said.startswith("ModelError: org/tiny: no folder of this name")
    assert "\n" not in said
    assert "not downloaded before, and the hub cannot be reached" in said
    assert "login" not in said
    assert "`hf auth login`" in opened(hub, tmp_path, "black-forest-labs/FLUX.1-dev", port)
    near = opened(hub, tmp_path, "black-forest-labs/FLUX.1-schnel", port)
    assert "hint: did you mean black-forest-labs/FLUX.1-schnell?" in near


def test_a_name_without_a_slash_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    assert "no such model: tiny" in opened(hub, tmp_path, "tiny")
    assert hub.requests == []

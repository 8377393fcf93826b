"""The front door: `libreflux demo` on the embedded family, a few steps of it for real."""

from __future__ import annotations

import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from libreflux.adapter.files import load_adapter
from libreflux.cli import demo, demo_page
from libreflux.cli.app import app
from libreflux.model.family import locate, open_model


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.pictures = 0
        self._inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "pre"
        self.pictures += tag == "img"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.blocks.append(data)
            self._inside = False


def test_the_family_is_whole_and_small() -> None:
    folder = locate("emoji-base")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40 * 2**20
    model = open_model("emoji-base")
    assert model.transformer is not None
    assert model.vae is not None
    assert sum(p.numel() for p in model.vae.parameters()) <= 2_000_000
    assert model.facts.text_padding == "drop"


def test_demo_writes_what_it_promises_and_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    monkeypatch.setattr(demo, "GUIDANCE", (1.0, 3.0))
    demo.demo(Path("out"), steps=3, pictures=16)
    page = Path("out/index.html").read_text("utf-8")
    read = _Text()
    read.feed(page)
    assert read.pictures == 9  # eight training pictures and the grid
    with Image.open("out/grid.png") as grid, Image.open("out/before.png") as before:
        assert grid.width > before.width
    losses = [json.loads(line)["loss"] for line in Path("out/run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(losses) == 3
    changed = open_model("out/model", parts=("transformer",))
    assert changed.facts.lineage["base"] == "emoji-base"
    assert load_adapter(Path("out/run/adapter.safetensors")).metadata["step"] == "3"

    # The commands on the page are real ones: each is parsed by the command line itself.
    for command in read.blocks[0].splitlines():
        program, verb, *_ = shlex.split(command)
        assert program == "libreflux"
        help_text = CliRunner().invoke(app, [verb, "--help"])
        assert help_text.exit_code == 0
        for option in (word for word in shlex.split(command) if word.startswith("--")):
            assert option in help_text.output

    first = Path("out/run/adapter.safetensors").read_bytes()
    demo.demo(Path("out"), steps=3, pictures=16)
    assert Path("out/run/adapter.safetensors").read_bytes() == first


def test_loss_curve_draws_every_step() -> None:
    drawn = demo_page.loss_curve([1.0, 0.5, 0.25])
    assert drawn.count("<circle") == 3
    assert "no steps" in demo_page.loss_curve([])

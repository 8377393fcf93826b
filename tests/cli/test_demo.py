"""The front door: `libreflux demo` on the embedded family, a few steps of it for real."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from libreflux.adapter.files import load_adapter
from libreflux.cli import demo, demo_page
from libreflux.errors import RunError
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


def adapter_tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_adapter(path).tensors.items()}


def test_demo_writes_what_it_promises_and_runs_again(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path("my demo #2")  # a path that needs quoting everywhere
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    monkeypatch.setattr(demo, "GUIDANCE", (1.0, 3.0))
    demo.demo(out, steps=3, pictures=16)
    page = (out / "index.html").read_text("utf-8")
    read = _Text()
    read.feed(page)
    assert read.pictures == 9  # eight training pictures and the grid
    with Image.open(out / "grid.png") as grid, Image.open(out / "before.png") as before:
        assert grid.width > before.width
    losses = [json.loads(line)["loss"] for line in (out / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(losses) == 3
    changed = open_model(out / "model", parts=("transformer",))
    assert changed.facts.lineage["base"] == "emoji-base"
    assert load_adapter(out / "run/adapter.safetensors").metadata["step"] == "3"

    # The commands on the page do the same again.
    for command in read.blocks[0].splitlines():
        program, *arguments = shlex.split(command)
        assert program == "libreflux"
        assert run(*arguments).code == 0
    first = (out / "run/adapter.safetensors").read_bytes()
    assert adapter_tensors(out / "by-hand/run/adapter.safetensors") == adapter_tensors(out / "run/adapter.safetensors")

    demo.demo(out, steps=3, pictures=16)
    assert (out / "run/adapter.safetensors").read_bytes() == first
    with pytest.raises(RunError, match="steps"):
        demo.demo(out, steps=2, pictures=16)


@pytest.mark.parametrize("name", ["model", "recipe.yaml"])
def test_the_demo_touches_nothing_of_somebody_elses(tmp_path: Path, name: str) -> None:
    if name == "model":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    else:
        (tmp_path / name).write_text("mine: true")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="demo's"):
        demo.demo(tmp_path, steps=3, pictures=16)
    assert sorted(tmp_path.rglob("*")) == before


def test_loss_curve_draws_every_step() -> None:
    drawn = demo_page.loss_curve([1.0, 0.5, 0.25])
    assert drawn.count("<circle") == 3
    assert "no steps" in demo_page.loss_curve([])

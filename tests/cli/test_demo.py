"""The front door: `libreflux demo` on the embedded family, a few steps of it for real."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from libreflux.adapter.io import load_adapter
from libreflux.errors import RunError
from libreflux.probing.results import read_result
from libreflux.workflows import demo, demo_page
from opened import opened
from workflows.quick import measure_less


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


@pytest.mark.parametrize("name", ["emoji-base", "emoji-schnell"])
def test_the_family_is_whole(name: str) -> None:
    model = opened(name)
    assert sum(p.numel() for p in model.vae.parameters()) <= 2_000_000
    assert model.facts.text_padding == "drop"


def adapter_tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_adapter(path).tensors.items()}


def test_demo_writes_what_it_promises_and_runs_again(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path("my demo #2")  # a path that needs quoting everywhere
    monkeypatch.chdir(tmp_path)
    named = demo.Measured(pictures=4, prompts=2, guidance=(1.0, 4.0), steps=(1, 2))
    monkeypatch.setattr(demo, "MEASURED", named)
    small = demo.RECIPE.replace("batch: 32", "batch: 4").replace("resolution: 128", "resolution: 64")
    monkeypatch.setattr(demo, "RECIPE", small)
    measure_less(monkeypatch)
    demo.demo(out, steps=3, pictures=32)
    page = (out / "index.html").read_text("utf-8")
    read = _Text()
    read.feed(page)
    # Eight training pictures; two prompts by three models by two scales, by two numbers of steps; two seeds of one; and
    # each measured picture beside the training pictures that are nearest to it, by pixels and by content.
    assert read.pictures == 8 + 2 * 3 * 2 + 2 * 3 * 2 + 3 * 2 + 4 * 3
    assert "distilled" in page
    assert "set free" in page
    assert "Freedom" in page
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 4 * 64
        assert grid.height > 6 * 64
    losses = [json.loads(line)["loss"] for line in (out / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(losses) == 3
    assert load_adapter(out / "run/adapter.safetensors").metadata["step"] == "3"
    told = json.loads((out / "probe/freedom.json").read_text("utf-8"))["freedom"]
    assert {row["name"] for row in told} >= {"loss", "slope", "clipped", "accuracy"}

    # The commands on the page do the same again.
    assert len(read.blocks[0].splitlines()) == 5
    for command in read.blocks[0].splitlines():
        program, *arguments = shlex.split(command)
        assert program == "libreflux"
        assert run(*arguments).code == 0
    first = (out / "run/adapter.safetensors").read_bytes()
    assert adapter_tensors(out / "by-hand/run/adapter.safetensors") == adapter_tensors(out / "run/adapter.safetensors")
    assert json.loads((out / "by-hand/probe/freedom.json").read_text("utf-8"))["freedom"] == told

    demo.demo(out, steps=3, pictures=32)
    measured, by_hand = (read_result(folder).settings for folder in (out / "probe", out / "by-hand/probe"))
    wanted = json.loads(json.dumps(dataclasses.asdict(named)))
    assert {name: measured[name] for name in wanted} == wanted
    assert measured == by_hand
    assert (out / "run/adapter.safetensors").read_bytes() == first
    with pytest.raises(RunError, match="steps"):
        demo.demo(out, steps=2, pictures=32)


def test_the_demo_touches_nothing_of_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine: true")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="demo's"):
        demo.demo(tmp_path, steps=3, pictures=32)
    assert sorted(tmp_path.rglob("*")) == before


def test_loss_curve_draws_every_step() -> None:
    drawn = demo_page.loss_curve([1.0, 0.5, 0.25])
    assert drawn.count("<circle") == 3
    assert "no steps" in demo_page.loss_curve([])

"""What is in memory when: text encoders and transformer never together, and the same bits whichever way."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import cpu_offload

from libreflux.cli import drawing
from libreflux.cli.drawing import open_for_drawing
from libreflux.cli.options import Offload
from libreflux.errors import RecipeError
from libreflux.model.family import Model, open_model
from libreflux.sample.metadata import Origin
from tiny import tiny_transformer

ORIGIN = Origin(
    prompt="a red apple", negative="a fox", seed=1, steps=2, guidance=3.0, width=32, height=32, model="tiny"
)
CPU = torch.device("cpu")


class Watch:
    """`open_model`, and how many text encoders and transformers lived when a transformer was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.alive: list[tuple[int, int]] = []
        self._texts: list[weakref.ref] = []
        self._transformers: list[weakref.ref] = []

    def __call__(self, name: str, *, parts: Sequence[str] = (), **options: Any) -> Model:
        if "transformer" in parts:
            counts = (sum(ref() is not None for ref in refs) for refs in (self._texts, self._transformers))
            self.alive.append(tuple(counts))
        model = open_model(name, parts=parts, **options)
        self.asked.append(tuple(parts))
        if model.text is not None:
            both = (model.text.text_encoder, model.text.text_encoder_2)
            self._texts += [weakref.ref(kept) for one in both for kept in (one, *one.parameters())]
        if model.transformer is not None:
            self._transformers.append(weakref.ref(model.transformer))
        return model


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(drawing, "open_model", made)
    return made


def test_the_text_encoders_are_gone_when_the_transformer_comes(
    run: Callable, watch: Watch, tiny_model_dir: Path, tmp_path: Path
) -> None:
    command = ["generate", "a fox", "a red apple", "--model", tiny_model_dir, "--steps", 2, "--out"]
    assert run(*command, tmp_path / "auto").code == 0
    assert watch.asked == [(), ("vae",), ("text",), ("transformer",)] and watch.alive == [(0, 0)]
    assert run(*command, tmp_path / "none", "--offload", "none").code == 0
    assert watch.alive[1][0] > 10  # the watch sees what is alive
    for one in (tmp_path / "auto").iterdir():
        assert one.read_bytes() == (tmp_path / "none" / one.name).read_bytes()
    again = run("generate", "--remake", one, "--offload", "none", "--out", tmp_path / "again.png")
    assert again.code == 0 and (tmp_path / "again.png").read_bytes() == one.read_bytes()


def test_a_grid_holds_one_model_at_a_time(run: Callable, watch: Watch, tiny_model_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tiny_transformer(seed=5).save_pretrained(other / "transformer")
    done = run(
        "grid", "a fox", "an apple", "--model", tiny_model_dir, "--model", other, "--guidance", "1,3", "--steps", 1,
        "--negative", "blue", "--out", tmp_path / "grid",
    )  # fmt: skip
    assert done.code == 0 and "8 of 8 cells" in done.out, done.err
    assert watch.alive == [(0, 0), (0, 0)]


@pytest.mark.parametrize("offload", [Offload.model, Offload.sequential])
def test_diffusers_hooks_draw_the_same_bits(
    tiny_model_dir: Path, offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the GPU's place: everything passes through the hooks, nothing is left where they put it."""
    # accelerate tells "cpu:0", which diffusers makes of "cpu", from "cpu".
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, _, **options: cpu_offload(part, CPU, **options))
    chosen = open_for_drawing(str(tiny_model_dir), device="cpu")
    expected = chosen.load([ORIGIN]).draw(ORIGIN)
    opened = dataclasses.replace(open_for_drawing(str(tiny_model_dir), device="cpu"), offload=offload).load([ORIGIN])
    resting = "meta" if offload is Offload.sequential else "cpu"
    for _ in range(2):
        assert opened.draw(ORIGIN).tobytes() == expected.tobytes()
        parts = (opened.pipe.transformer, opened.pipe.vae)
        assert {one.device.type for part in parts for one in part.parameters()} == {resting}


def test_int8_is_never_moved_layer_by_layer(tiny_model_dir: Path) -> None:
    chosen = open_for_drawing(str(tiny_model_dir), device="cpu", quantize="int8")
    with pytest.raises(RecipeError, match="--offload sequential: does nothing for int8"):
        dataclasses.replace(chosen, offload=Offload.sequential).load([ORIGIN])


def test_the_nearest_facts_are_told_once(
    run: Callable, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    (folder / "libreflux.json").unlink()
    assert run("generate", "x", "--model", folder, "--steps", 1, "--out", tmp_path / "x.png").code == 0
    assert caplog.text.count("taken for a model like FLUX.1-schnell") == 1

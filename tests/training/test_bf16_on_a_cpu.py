"""A CPU that has no instructions for bf16 is told of, and the demo takes fp32 there."""

from __future__ import annotations

from pathlib import Path

import pytest

from libreflux.model import device
from libreflux.recipe import Recipe
from libreflux.training import loop
from libreflux.training.callbacks import Callbacks
from libreflux.workflows import demo
from training.recorded import Tree


@pytest.mark.parametrize(("base", "instructions", "told"), [("int8", False, 1), ("int8", True, 0), ("fp32", False, 0)])
def test_a_run_in_bf16_says_what_would_be_faster(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, instructions: bool, told: int
) -> None:
    heard: list[str] = []

    class Listener(Callbacks):
        def on_notice(self, line: str) -> None:
            heard.append(line)

    monkeypatch.setattr(loop, "multiplies_bf16", lambda device: instructions)
    loop.fit(Recipe.model_validate({**recipe_tree(tmp_path / "run", steps=1), "base": base}), Listener())
    assert sum("base: fp32" in line for line in heard) == told


@pytest.mark.parametrize("instructions", [False, True])
def test_the_demo_trains_and_measures_in_what_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, instructions: bool
) -> None:
    monkeypatch.setattr(device, "multiplies_bf16", lambda device: instructions)
    assert (demo._base(), demo._dtype()) == (("int8", "stored") if instructions else ("fp32", "fp32"))
    commands = "\n".join(demo.by_hand(Path("out"), 32))
    assert ("--dtype fp32" in commands) is not instructions

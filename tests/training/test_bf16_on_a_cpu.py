"""A CPU that has no instructions for bf16 is told of, and the demo takes fp32 there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from libreflux.errors import RunError
from libreflux.model import device
from libreflux.recipe import Recipe
from libreflux.training import loop
from libreflux.training.callbacks import Callbacks
from libreflux.workflows import demo, probe
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: bool
) -> None:
    asked: list[tuple[str, str]] = []

    def trained(options: Any) -> Any:
        asked.append(("base", options.recipe.base))
        return SimpleNamespace(adapter=tmp_path / "adapter.safetensors")

    def measured(*_: Any, dtype: str, **__: Any) -> Any:
        asked.append(("dtype", dtype))
        raise RunError("enough", where="test")

    monkeypatch.setattr(demo, "train_with", trained)
    monkeypatch.setattr(probe, "probe", measured)
    for now in (instructions, not instructions):  # a demo that was begun elsewhere goes on as it was
        monkeypatch.setattr(device, "multiplies_bf16", lambda device, now=now: now)
        with pytest.raises(RunError, match="enough"):
            demo.demo(tmp_path / "demo", steps=2, pictures=32)
    assert asked == 2 * [("base", "int8" if instructions else "fp32"), ("dtype", "stored" if instructions else "fp32")]
    for dtype in ("stored", "fp32"):
        commands = "\n".join(demo.by_hand(Path("out"), 32, dtype))
        assert ("--dtype fp32" in commands) == (dtype == "fp32")

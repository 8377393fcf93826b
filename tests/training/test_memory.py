"""Running out of memory, with the exceptions that really come: one line with what helps, and nothing lost."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from libreflux.data.held_out import HeldOut
from libreflux.errors import RunError
from libreflux.model.device_faults import is_out_of_memory
from libreflux.recipe import AdapterSpec, Recipe, read_recipe
from libreflux.training import memory
from libreflux.training.callbacks import Callbacks
from libreflux.training.loop import fit
from libreflux.training.memory import explained

Tree = Callable[..., dict[str, Any]]


def too_much(*_: object) -> torch.Tensor:
    return torch.empty(1 << 46)  # 2^48 bytes: more than any process can address


def raised(function: Callable[[], object]) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        function()
    return caught.value


def test_what_torch_and_python_raise_is_known() -> None:
    assert is_out_of_memory(raised(too_much))
    assert is_out_of_memory(raised(lambda: bytearray(1 << 60)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(raised(lambda: torch.zeros(2) @ torch.zeros(3)))


class OutOfMemoryIn(Callbacks):
    """From the `nth` step of this process on its forward pass takes more memory than there is."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        transformer.register_forward_pre_hook(self.forward)

    def forward(self, *_: object) -> None:
        self.left -= 1
        if self.left <= 0:
            too_much()


def test_a_step_without_memory_ends_the_run_in_one_line_and_it_resumes(recipe_tree: Tree, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "steps": 3,
        "save": {"every": 1},
        "samples": {"every": 9, "at_start": True, "prompts": ["a fox"]},
    }
    whole = fit(Recipe.model_validate(recipe_tree(tmp_path / "whole", **changes)))
    recipe = Recipe.model_validate(recipe_tree(tmp_path / "run", **changes))
    with pytest.raises(RunError) as refusal:
        fit(recipe, OutOfMemoryIn(2))
    line = str(refusal.value)
    assert line.startswith("step 2, batch 2, resolution 32, device auto: out of memory; hint: ")
    hints = [
        "gradient_checkpointing: true",
        "base: int8",
        "batch: 1 with accumulate: 2",
        "resolution",
        "another `out`, optimizer.kind: adamw_bf16",
    ]
    line = line.partition("hint: ")[2]
    assert sorted(hints, key=line.index) == hints
    assert fit(recipe).read_bytes() == whole.read_bytes()


def test_what_is_set_already_is_no_mend(recipe_tree: Tree, tmp_path: Path) -> None:
    spare = {"gradient_checkpointing": True, "base": "int8", "batch": 1, "optimizer": {"kind": "adamw_bf16"}}
    with pytest.raises(RunError) as refusal, explained("step 1", Recipe.model_validate(recipe_tree(tmp_path, **spare))):
        too_much()
    assert "in this order, resolution below 32" in str(refusal.value)


def test_an_odd_batch_keeps_its_product_with_accumulate(recipe_tree: Tree, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_tree(tmp_path, batch=3, accumulate=2))
    with pytest.raises(RunError, match="batch: 1 with accumulate: 6;"), explained("step 1", recipe):
        too_much()


def test_measuring_without_memory_has_its_own_mend(recipe_tree: Tree, tmp_path: Path) -> None:
    class Measuring(Callbacks):
        def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: HeldOut) -> None:
            too_much()

    recipe = Recipe.model_validate(recipe_tree(tmp_path / "run", held_out={"share": 0.4, "every": 1}))
    with pytest.raises(RunError, match=r"^held-out pictures after step 0.*in this order, held_out\.every: 0"):
        fit(recipe, Measuring())


def test_preparing_without_memory_has_its_own_mend(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoencoderKL, "encode", too_much)
    with pytest.raises(
        RunError, match=r"^encoding a crop of 32 x 32 pixels, .*: out of memory; hint: a smaller"
    ) as refusal:
        fit(Recipe.model_validate(recipe_tree(tmp_path / "run")))
    assert "gradient_checkpointing" not in str(refusal.value)


def named_keys(hint: str) -> dict[str, str]:
    """Every `key: value` that a hint names."""
    found = re.findall(r"([a-z]\w*(?:\.\w+)*): (\w+)", hint)
    assert found
    return dict(found)


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_cache": "none", "samples": {"every": 1, "at_start": True, "prompts": ["a fox"]}, "batch": 3},
        {"text_precision": "fp32", "batch": 1, "device": "cpu"},
    ],
    ids=["plain", "none", "fp32"],
)
def test_every_key_that_a_mend_names_is_a_key_of_the_recipe(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], card: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    tree = recipe_tree(tmp_path, **changes, held_out={"share": 0.4})
    recipe = Recipe.model_validate(tree)
    for hint in (memory.training, memory.preparing, memory.measuring, memory.drawing):
        line = hint(recipe)
        keys = named_keys(line)
        set_to = read_recipe(json.dumps(tree), "test", [f"{key}={value}" for key, value in keys.items()])
        for key in keys:  # none is what the recipe says already
            parts = key.split(".")
            before, after = (functools.reduce(getattr, parts, which) for which in (recipe, set_to))
            assert before != after or key in ("samples.every", "accumulate"), line
        assert "adapter.targets" not in line or "targets" in AdapterSpec.model_fields
    assert ("text_precision: fp32" in memory.preparing(recipe)) == (card and recipe.text_precision == "auto")


def test_other_errors_pass(recipe_tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="size"), explained("step 1", Recipe.model_validate(recipe_tree(tmp_path))):
        torch.zeros(2) @ torch.zeros(3)

"""Training on samples of the VAE's posterior: stopped and resumed it is the same run, and never that of the mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libreflux.errors import RunError
from libreflux.recipe import Recipe
from libreflux.training.loop import fit


def test_a_run_on_samples_resumes_to_the_bit_and_cannot_turn_to_the_mean(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"latents": "sample", "cache": str(tmp_path / "sampled")}
    whole = fit(Recipe.model_validate(recipe_tree(tmp_path / "whole", **changes, steps=4)))
    parted = recipe_tree(tmp_path / "parted", **changes)
    for steps in (1, 3, 4):
        last = fit(Recipe.model_validate(parted | {"steps": steps}))
    assert last.read_bytes() == whole.read_bytes()
    mean = fit(Recipe.model_validate(recipe_tree(tmp_path / "mean", steps=4)))
    assert mean.read_bytes() != whole.read_bytes()
    for run, other in (("whole", "mean"), ("mean", "sample")):
        tree = recipe_tree(tmp_path / run, latents=other, steps=5)
        with pytest.raises(RunError, match=r"latents \(.*\); hint: .*`fork`"):
            fit(Recipe.model_validate(tree))

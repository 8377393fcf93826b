"""The recipes that ship: each loads, says what every line is for, and fits the model that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from libreflux.adapter.plan import plan
from libreflux.model.int8 import quantise_model
from libreflux.recipe import load_recipe
from libreflux.train.estimate import estimate, meta_transformer
from libreflux.train.optimizer import parameter_dtype

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MILLIONS = {"flux-24gb-free.yaml": 597.7, "flux-24gb-style.yaml": 35.5, "flux-8xh100.yaml": 3226.8}
FLUX = [path for path in RECIPES if path.name.startswith("flux")]


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    """FLUX.1-schnell at full size, without memory."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid_and_survives_its_own_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert recipe.save.every % recipe.ema_every == 0  # else a checkpoint's averages are of an earlier step


@pytest.mark.parametrize("path", FLUX, ids=lambda path: path.name)
def test_adapters_for_flux_have_the_size_that_their_comment_says(path: Path, flux: nn.Module) -> None:
    rows = plan(load_recipe(path).adapter, flux).layers
    millions = sum(row.parameters for row in rows) / 1e6
    assert millions == pytest.approx(MILLIONS[path.name], abs=0.05)
    assert f"{MILLIONS[path.name]:,.1f} M" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "gigabytes"), [("flux-24gb-free", 22), ("flux-24gb-style", 22), ("flux-8xh100", 76)])
def test_memory_is_estimated_to_fit(name: str, gigabytes: float) -> None:
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / f"{name}.yaml")
    flux = meta_transformer({"guidance_embeds": False}, torch.bfloat16)
    if recipe.base == "int8":
        quantise_model(flux)
    if recipe.gradient_checkpointing:
        flux.enable_gradient_checkpointing()
    side = max(recipe.resolution) // 8
    found = estimate(
        flux,
        plan(recipe.adapter, flux).layers,
        adapter_dtype=parameter_dtype(recipe.optimizer),
        batch=recipe.batch,
        latent_size=(side, side),
        text_tokens=512,
    )
    print(found.table())
    assert found.total < gigabytes * 1e9


def test_every_recipe_is_here() -> None:
    assert {path.name for path in FLUX} == set(MILLIONS) and len(RECIPES) > len(FLUX)

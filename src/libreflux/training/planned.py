"""What follows from a recipe and a model's configuration alone, before a weight is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from libreflux.adapter import plan
from libreflux.adapter.lineage import merged_in
from libreflux.errors import RecipeError
from libreflux.files import sha256_file
from libreflux.model.offload import block_names
from libreflux.model.source import ModelSource
from libreflux.recipe import Recipe
from libreflux.training import training_adapter
from libreflux.training.adversary import spec_of

# Of an 8-bit base: of what stays dense.
BASE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16, "w8a8": torch.bfloat16}
INT8_BASES = ("int8", "w8a8")


def plan_layers(recipe: Recipe, source: ModelSource) -> plan.Plan:
    """The layers that a recipe adapts, from the model's configuration alone: no weight is loaded.

    Args:
        recipe: the run's.
        source: its model.

    Raises:
        RecipeError: a guidance-embedded model without `guidance`, or `guidance` for any other; a student's steps on
            a ladder that depends on the picture's size; a block that the model does not have, for an adversary;
            an adapter to start from that is merged into the model.
        AdapterError: a pattern that matches nothing, or a file that does not fit; see `adapter.plan` and
            `training_adapter.read`.
    """
    if source.facts.guidance_embeds and recipe.guidance is None:
        hint = "set the value to train and draw at, e.g. guidance: 1.0"
        raise RecipeError("this model has a guidance embedding", where="guidance", hint=hint)
    if recipe.guidance is not None and not source.facts.guidance_embeds:
        raise RecipeError("this model has no guidance embedding", where="guidance", hint="remove this key")
    if source.facts.shift is None and recipe.distil is not None and recipe.distil.steps is not None:
        hint = "write a fixed shift into its libreflux.json, or remove this key"
        raise RecipeError("this model's steps depend on the picture's size", where="distil.steps", hint=hint)
    _check_blocks(recipe, source)
    _check_start(recipe, source)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(dict(source.config))
    planned = plan.plan(recipe.adapter, transformer)
    if (beside := training_adapter.read(recipe)) is not None:
        beside.check_layers(transformer)
    return planned


def _check_blocks(recipe: Recipe, source: ModelSource) -> None:
    adversarial = spec_of(recipe)
    count = len(block_names(source.config))
    wrong = [block for block in (adversarial and adversarial.blocks) or () if block >= count]
    if wrong:
        hint = f"use numbers from 0 to {count - 1}"
        raise RecipeError(f"the model has no block {wrong[0]}", where="distil.adversarial.blocks", hint=hint)


def _check_start(recipe: Recipe, source: ModelSource) -> None:
    """Raises RecipeError where the adapter to start from is in the base already: it would be there twice."""
    inside, start = merged_in(source.facts.lineage), recipe.adapter.init_from
    if start is None or not inside or not Path(start).is_file():  # whoever reads it says what is wrong
        return
    if sha256_file(Path(start)) in inside:
        hint = "remove init_from, for a new adapter on top; or train on the model that it was merged into"
        raise RecipeError(f"{start} is merged into {source.name} already", where="adapter.init_from", hint=hint)

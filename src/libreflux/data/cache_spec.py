"""What a cache is to hold, and how it is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from libreflux.data.crops import View, views
from libreflux.data.precision import TextPrecision
from libreflux.model.source import ModelSource
from libreflux.recipe import DataSource, Recipe


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Pictures, captions and prompts, the model that encodes them, and where they are kept.

    Attributes:
        model: name, folder or hub id, or such a model, open; its VAE and text encoders are used.
        data: the folders.
        views: crops and resolutions.
        text_padding: "drop" or "trim".
        out: the cache folder.
        prompts: texts to encode besides the captions; the empty prompt always is.
        text_cache: how text is stored, see ``int8_text`` for int8; "none" stores how many tokens each caption has, and
            the conditioning of ``prompts`` alone.
        text_precision: what the text encoders compute in: "fp32", "bf16", or "auto", as ``out`` was begun, else fp32 on
            a CPU and bf16 on all else. The VAE computes in fp32.
        latents: "mean" of the posterior, or its standard deviation too, to "sample" from.
        max_quarantined: share of the pictures, in [0, 1], that may be unusable.
        max_tokens: the most T5 tokens of a text; None: as many as the model reads once it is trained.
    """

    model: str | Path | ModelSource
    data: Sequence[DataSource]
    views: Sequence[View]
    text_padding: str
    out: Path
    prompts: Sequence[str] = ()
    text_cache: Literal["bf16", "int8", "none"] = "bf16"
    text_precision: TextPrecision = "auto"
    latents: Literal["mean", "sample"] = "mean"
    max_quarantined: float = 0.02
    max_tokens: int | None = None


def spec_of(recipe: Recipe, source: ModelSource | None = None) -> CacheSpec:
    """What a recipe trains on and holds out; the folder of ``held_out.path`` is the last source.

    Args:
        recipe: see `prepare.prepare_recipe`.
        source: its model, where that is open.
    """
    apart = [] if recipe.held_out.path is None else [DataSource(path=recipe.held_out.path)]
    return CacheSpec(
        model=recipe.model if source is None else source,
        data=[*recipe.data, *apart],
        views=views(recipe.crop, recipe.resolution),
        text_padding=recipe.text_padding,
        out=recipe.cache_dir,
        prompts=recipe.samples.prompts,
        text_cache=recipe.text_cache,
        text_precision=recipe.text_precision,
        latents=recipe.latents,
        max_quarantined=recipe.max_quarantined,
    )

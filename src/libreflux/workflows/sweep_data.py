"""What a sweep's candidates are judged on: pictures that the run was not trained on, encoded once for all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from libreflux.data.cache import Cache
from libreflux.data.cache_spec import CacheSpec, spec_of
from libreflux.data.cached_pictures import is_cache
from libreflux.data.crops import View, bucket_step, views
from libreflux.data.held_out import HeldOut, split
from libreflux.data.prepare import Sources, prepare
from libreflux.data.sources import require_folder
from libreflux.errors import DataError, OptionError
from libreflux.model.opening import open_model
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt
from libreflux.recipe import DataSource, Recipe
from libreflux.result_key import digest
from libreflux.workflows.probe_data import ProbeData
from libreflux.workflows.probe_model import ProbedModel
from libreflux.workflows.progress import Report
from libreflux.workflows.sweep_options import SweepOptions

DRAWN = 2
"""Captions that are drawn when no prompt is given."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the pictures come from.

    Attributes:
        folder: of captioned pictures; None: the run's own share, or the emoji family's.
        share: whether they are the share that the run's recipe holds out.
    """

    folder: Path | None
    share: bool = False


def place_of(options: SweepOptions, recipe: Recipe, model: ProbedModel) -> Place:
    """Where the pictures come from, before there is a result's folder.

    Raises:
        DataError: no such folder.
        OptionError: no folder is named, and neither the recipe nor the model's family has pictures.
    """
    if options.data is not None:
        require_folder(Path(options.data))
        return Place(Path(options.data))
    apart = recipe.held_out.path
    if apart is not None and Path(apart).expanduser().is_dir():
        return Place(Path(apart).expanduser())
    there = all(Path(one.path).expanduser().is_dir() for one in recipe.data) and is_cache(recipe.cache_dir)
    if recipe.held_out.share > 0 and there and recipe.text_cache != "none":
        if options.resolution is not None:
            raise OptionError("belongs to `data`", "resolution", hint="remove it, or name a folder with `data`")
        return Place(None, share=True)
    if model.family:
        return Place(None)
    hint = "name a folder of captioned pictures that the run was not trained on"
    raise OptionError("the run holds out no pictures that are here", "data", hint=hint)


def sweep_data(
    options: SweepOptions,
    recipe: Recipe,
    model: ProbedModel,
    place: Place,
    out: Path,
    device: torch.device,
    report: Report,
) -> ProbeData:
    """Reads and encodes what is not encoded yet.

    Args:
        options: of the sweep.
        recipe: of the run.
        model: under one of the run's adapters.
        place: of the pictures.
        out: the result's folder.
        device: of the encoders.
        report: told of what is encoded.

    Raises:
        DataError: fewer than two pictures, or whatever `prepare` refuses.
    """
    if place.share:
        cache, held_out, view = _own_share(options, recipe, model, device, report)
    else:
        view = _view(options, recipe)
        folder = place.folder or _family(out, options.pictures)
        cache, sources = prepare(_spec(options, model, folder, view, out), device=str(device), progress=report)
        held_out = HeldOut(cache, sources, view=view, count=options.pictures)
    if len(held_out) < 2:
        raise DataError("fewer than two pictures", where=place.folder, hint="give more of them")
    batch = options.batch or (1 if model.large else 8)
    captions = [text for part in held_out.batches(batch) for text in part.captions]
    prompts = list(options.texts) or list(dict.fromkeys(captions))[:DRAWN]
    settings = Settings(
        seed=options.seed,
        sigmas=tuple(map(float, options.sigmas)),
        pictures=len(held_out),
        prompts=len(prompts),
        guidance=tuple(map(float, options.guidance)),
        draw_steps=options.steps or model.facts.steps,
        resolution=view.resolution,
        batch=batch,
        dtype=recipe.base,
        data=(_told(place), digest([held_out.sample_ids, captions])),
    )
    return ProbeData(settings, held_out, cache, [ParsedPrompt(text) for text in prompts], captions, ())


def _told(place: Place) -> str:
    if place.share:
        return "the run's held-out share"
    return "emoji" if place.folder is None else place.folder.name


def _view(options: SweepOptions, recipe: Recipe) -> View:
    side = options.resolution or min(recipe.resolution)
    return View("centre", side, bucket_step(side))


def _spec(options: SweepOptions, model: ProbedModel, folder: Path, view: View, out: Path) -> CacheSpec:
    return CacheSpec(
        model=model.source,
        data=[DataSource(path=str(folder), caption_dropout=0.0)],
        views=[view],
        text_padding=model.facts.text_padding,
        out=out / "cache",
        prompts=options.texts,
        max_tokens=model.facts.max_tokens,
    )


def _own_share(
    options: SweepOptions, recipe: Recipe, model: ProbedModel, device: torch.device, report: Report
) -> tuple[Cache, HeldOut, View]:
    """From the run's own cache, where they are encoded already; the prompts join it."""
    spec = spec_of(recipe, open_model(model.name))
    spec = dataclasses.replace(spec, prompts=[*spec.prompts, *options.texts])
    found: tuple[Cache, Sources] = prepare(spec, device=str(device), progress=report)
    cache, sources = found
    view = views(recipe.crop, recipe.resolution)[0]
    return cache, HeldOut(cache, split(sources, recipe.held_out.share)[1], view=view, count=options.pictures), view


def _family(out: Path, pictures: int) -> Path:
    from libreflux.emoji import held_out

    return held_out.write_held_out(out / "data" / f"emoji-{pictures}", pictures)

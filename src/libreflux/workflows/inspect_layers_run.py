"""The layers of one model measured, compared, given a budget and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from libreflux import __version__
from libreflux.adapter.budget import as_targets, as_yaml, check_budget, spend
from libreflux.adapter.difference import Change
from libreflux.adapter.io import AdapterFile, attach_file
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Resolved, resolve
from libreflux.data.cache_spec import CacheSpec
from libreflux.data.crops import View, bucket_step
from libreflux.data.held_out import HeldOut
from libreflux.data.prepare import prepare
from libreflux.data.sources import require_folder
from libreflux.errors import DataError, OptionError
from libreflux.files import atomic_write_json, atomic_write_text, lock
from libreflux.model.device import make_current, pick_device, release
from libreflux.model.device_faults import explained
from libreflux.model.latents import own_side
from libreflux.model.source import ModelSource
from libreflux.model.text import TRAINED_PADDING
from libreflux.model.weight_reader import empty_transformer
from libreflux.printing import get_logger, printable
from libreflux.probing.layer_shares import shares
from libreflux.probing.layers import LayerTable, measure_layers
from libreflux.probing.report import layers_page
from libreflux.recipe import DataSource
from libreflux.workflows.adapters import adapted_facts, load_arguments, notice_other_base
from libreflux.workflows.compared import open_before, open_difference
from libreflux.workflows.inspect_layers import (
    FILE,
    PAGE,
    TARGETS,
    InspectLayersOptions,
    InspectLayersResult,
    as_json,
    measure_of,
    out_of,
)
from libreflux.workflows.probe_model import is_family

logger = get_logger(__name__)

DTYPES = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}
LARGE = 2_000_000_000
"""Parameters of a transformer from which on blocks are computed again in the backward pass."""
MOST_SIDE = 512
"""Pixels per side when nobody says how many: what hidden states and gradients tell needs no more."""


def run(options: InspectLayersOptions, budget: int | None) -> InspectLayersResult:
    """See `inspect_layers.inspect_layers_with`; the options are checked."""
    device = pick_device(options.device)
    make_current(device)
    before = open_before(
        options.model, "model", options.base, None if options.comfyui is None else Path(options.comfyui)
    )
    files = load_arguments(options.adapters)
    source = _as_trained(before.with_facts(adapted_facts(before.facts, files)))
    if files:
        notice_other_base(source.hash, files)
    if budget is not None:
        check_budget(linear_shapes(empty_transformer(source.config)), budget)
    out = out_of(options, [Path(options.model).name, *(Path(file.where).resolve().parent.name for file, _ in files)])
    data = _data(options, source)
    compared = None if options.against is None else open_difference(before, options.against)[0]
    with lock(out):
        held_out = _held_out(options, source, data, out, device)
        table = _measured(options, source, files, held_out, device)
        changes: tuple[Change, ...] = ()
        if compared is not None:
            with options.progress("comparing", "tensor") as report:
                changes = tuple(compared.changes(report))
        rows = () if budget is None else _spent(options, table, changes, budget)
        headline = layers_page.headline(table, changes)
        result = InspectLayersResult(out, out / PAGE, headline, table, changes, out / TARGETS if rows else None, rows)
        _write(options, result, budget)
    return result


def _as_trained(source: ModelSource) -> ModelSource:
    """The model with text as a cache can hold it: what is drawn with padding is measured as a recipe would train it."""
    padding = source.facts.text_padding
    if padding in TRAINED_PADDING:
        return source
    logger.warning(
        "%s reads padded text (%s): its layers are measured without, as they are trained", source.name, padding
    )
    return source.with_facts(dataclasses.replace(source.facts, text_padding="drop"))


def _data(options: InspectLayersOptions, source: ModelSource) -> Path | None:
    """The folder of pictures; None: the emoji family's."""
    if options.data is not None:
        require_folder(Path(options.data))
        return Path(options.data)
    if not (source.path.is_dir() and is_family(source)):
        hint = "name a folder of captioned pictures"
        raise OptionError("is not of the emoji family, whose pictures we have", "data", hint=hint)
    return None


def _held_out(
    options: InspectLayersOptions, source: ModelSource, data: Path | None, out: Path, device: torch.device
) -> HeldOut:
    """The pictures and their captions, encoded before the transformer is loaded."""
    if data is None:
        from libreflux.emoji import held_out

        data = held_out.write_held_out(out / "data" / f"emoji-{options.pictures}", options.pictures)
    side = options.resolution or min(MOST_SIDE, own_side(source.part_config("vae"), source.path))
    view = View("centre", side, bucket_step(side))
    spec = CacheSpec(
        model=source,
        data=[DataSource(path=str(data), caption_dropout=0.0)],
        views=[view],
        text_padding=source.facts.text_padding,
        out=out / "cache",
        max_tokens=source.facts.max_tokens,
    )
    with options.progress("preparing", "item") as report:
        cache, sources = prepare(spec, device=str(device), progress=report)
    found = HeldOut(cache, sources, view=view, count=options.pictures)
    if not len(found):
        raise DataError("no captioned pictures", where=data, hint="give a folder with one or more")
    return found


def _measured(
    options: InspectLayersOptions,
    source: ModelSource,
    files: list[tuple[AdapterFile, float]],
    held_out: HeldOut,
    device: torch.device,
) -> LayerTable:
    smaller = "a smaller --resolution, --quantize int8, or --device cpu"
    with explained(f"measuring the layers on {device}", smaller):
        release(device)  # the text encoders, before the transformer comes
        quantise = True if options.quantize == "int8" else None
        transformer = source.load_transformer(dtype=DTYPES[options.dtype], quantise=quantise, device=device)
        for file, weight in files:
            attach_file(transformer, file, weight, dtype=transformer.dtype)
        transformer.requires_grad_(False).eval()
        if sum(tensor.numel() for tensor in transformer.state_dict().values()) > LARGE:
            transformer.enable_gradient_checkpointing()
        with options.progress("measuring", "pass") as report:
            return measure_layers(
                transformer,
                held_out,
                sigmas=options.sigmas,
                guidance=source.facts.embedded_guidance,
                seed=options.seed,
                on_sample=report,
            )


def _spent(
    options: InspectLayersOptions, table: LayerTable, changes: tuple[Change, ...], budget: int
) -> tuple[Resolved, ...]:
    """What each layer gets of the budget, by the very patterns that are written."""
    shapes = [(name, *size) for name, size in table.sizes.items()]
    spent = spend(shapes, shares(measure_of(options), table, changes), budget)
    rows = resolve(shapes, as_targets(spent.factors))
    if {row.name: row.factor for row in rows} != spent.factors:
        raise RuntimeError("the patterns do not choose what was chosen")
    return tuple(rows)


def _write(options: InspectLayersOptions, result: InspectLayersResult, budget: int | None) -> None:
    told = {
        "model": options.model,
        "adapters": [
            str(one) for one in ([options.adapters] if isinstance(options.adapters, str | Path) else options.adapters)
        ],
        "against": options.against,
        "measure": measure_of(options) if budget is not None else None,
        "budget": budget,
        "libreflux": __version__,
    }
    if result.targets is not None:
        factors: Mapping[str, int] = {row.name: row.factor for row in result.layers if row.factor is not None}
        heading = (
            f"LoKr of {result.parameters:,} parameters on {len(factors)} layers of {printable(options.model)},"
            f" spent by the measure {measure_of(options)!r}.",
            "Put this section into a recipe; `libreflux train RECIPE --dry-run` shows what it chooses.",
        )
        atomic_write_text(result.targets, as_yaml(as_targets(factors), heading))
    names = (options.model, options.against or "")
    atomic_write_text(
        result.page, layers_page.page(result.table, result.changes, result.layers, names, measure_of(options))
    )
    atomic_write_json(result.folder / FILE, as_json(result, told))

"""Which layers of a model matter, by hidden states, gradients and changes; and a budget spent on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from libreflux.probing.layer_shares import can_have, changed_shares, shares
from libreflux.probing.layers import LayerTable, measure_layers
from libreflux.probing.report import layers_page
from libreflux.recipe import DataSource
from libreflux.workflows.adapters import adapted_facts, check_base, load_arguments, result_name
from libreflux.workflows.compared import open_before, open_difference
from libreflux.workflows.inspect_layers_options import (
    FILE,
    PAGE,
    TARGETS,
    InspectLayersOptions,
    check_options,
    measure_of,
    out_of,
    try_out,
)
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.probe_model import is_family

logger = get_logger(__name__)

DTYPES = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}
LARGE = 2_000_000_000
"""Parameters of a transformer from which on blocks are computed again in the backward pass."""
MOST_SIDE = 512
"""Pixels per side when nobody says how many: what hidden states and gradients tell needs no more."""


@dataclass(frozen=True)
class InspectLayersResult:
    """What was found.

    Attributes:
        folder: of the result.
        page: an HTML page that shows it.
        headline: the page's sentence of what was found.
        table: distances and gradients.
        changes: every tensor that `against` was compared in; () without.
        targets: the `adapter` section that was written; None without a budget.
        layers: what it gives each layer.
    """

    folder: Path
    page: Path
    headline: str
    table: LayerTable
    changes: tuple[Change, ...] = ()
    targets: Path | None = None
    layers: tuple[Resolved, ...] = ()

    @property
    def file(self) -> Path:
        """What holds the numbers."""
        return self.folder / FILE

    @property
    def parameters(self) -> int:
        """Of the adapter that the targets are for."""
        return sum(row.parameters for row in self.layers)


def inspect_layers_with(options: InspectLayersOptions) -> InspectLayersResult:
    """Measures what each layer of a model does, and shows it by depth.

    By how far every block turns the hidden states, at several noise levels; how large the gradient of each layer is;
    and with `against` how much each layer changed. With `budget` it also writes an `adapter` section for a recipe,
    which spends so many parameters where the measure says.

    Raises:
        OptionError: an option that has no effect or is out of range, data missing for a model that is not of the emoji
            family, or a budget that cannot be spent.
        RunError: a folder that is another's, or cannot be written.
        LibrefluxError: a model, adapter or picture that cannot be read.

    Example::

        import libreflux

        found = libreflux.inspect_layers("emoji-base", pictures=4, sigmas=[0.5], budget="400k")
        print(found.headline)
        print(found.parameters, found.targets)
    """
    budget = check_options(options)
    if options.out is not None:
        try_out(Path(options.out))
    device = pick_device(options.device)
    make_current(device)
    before = open_before(
        options.model, "model", options.base, None if options.comfyui is None else Path(options.comfyui)
    )
    files = load_arguments(options.adapters, training_adapters=True)
    source = _as_trained(before.with_facts(adapted_facts(before.facts, files)))
    if files:
        check_base(source, source.hash, files)
    measure, shapes = measure_of(options), linear_shapes(empty_transformer(source.config))
    if budget is not None:
        check_budget([row for row in shapes if can_have(measure, row[0])], budget)
    out = out_of(options, result_name(options.model, [Path(file.where) for file, _ in files]))
    data = _data(options, source)
    changes = _changes(options, before)
    if budget is not None and measure == "change":
        spend(shapes, changed_shares(changes), budget)  # refused here, before anything is measured
    with lock(out):
        held_out = _held_out(options, source, data, out, device)
        table = _measured(options, source, files, held_out, device)
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


def _changes(options: InspectLayersOptions, before: ModelSource) -> tuple[Change, ...]:
    if options.against is None:
        return ()
    difference, _ = open_difference(before, options.against)
    with options.progress("comparing", "tensor") as report:
        return tuple(difference.changes(report))


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
    smaller = "a smaller resolution, int8 weights, or the CPU"
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
    atomic_write_json(result.folder / FILE, _as_json(result, told))  # first: the folder is known by it
    if result.targets is not None:
        factors: Mapping[str, int] = {row.name: row.factor for row in result.layers if row.factor is not None}
        heading = (
            f"LoKr of {result.parameters:,} parameters on {len(factors)} layers of {printable(options.model)},"
            f" spent by the measure {measure_of(options)!r}.",
            "Put this section into a recipe; a dry run of the training shows what it chooses.",
        )
        atomic_write_text(result.targets, as_yaml(as_targets(factors), heading))
    else:
        (result.folder / TARGETS).unlink(missing_ok=True)  # of a call before, with a budget
    names = (options.model, options.against or "")
    atomic_write_text(
        result.page, layers_page.page(result.table, result.changes, result.layers, names, measure_of(options))
    )


def _as_json(result: InspectLayersResult, told: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result."""
    changes = [dataclasses.asdict(one) | {"relative": _finite(one.relative)} for one in result.changes]
    rows = [{"layer": row.name, "factor": row.factor, "parameters": row.parameters} for row in result.layers]
    found = {"schema": 1, **told, "headline": result.headline, **result.table.as_json()}
    return found | ({"changes": changes} if changes else {}) | ({"adapter": rows} if rows else {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


inspect_layers = by_keywords(InspectLayersOptions, inspect_layers_with)

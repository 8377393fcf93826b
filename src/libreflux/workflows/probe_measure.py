"""One model measured: its pictures, prompts and texts made ready, then every section of a probe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from libreflux.adapter.io import attach_file
from libreflux.data.cache import Cache
from libreflux.files import lock, sha256_file
from libreflux.model.device import make_current, pick_device, release
from libreflux.model.device_faults import explained
from libreflux.model.latents import own_side
from libreflux.model.locate import part_folder
from libreflux.model.parts import json_object
from libreflux.places import file_place, folder_place
from libreflux.printing import get_logger
from libreflux.probing import drawing
from libreflux.probing import run as probe_run
from libreflux.probing.context import PaddingTexts, ProbeContext
from libreflux.probing.features import features_digest, load_features
from libreflux.probing.judges import Judge, load_judge
from libreflux.probing.reader import Reader
from libreflux.probing.results import FILE, Picture, Result
from libreflux.probing.section import Section
from libreflux.probing.sections import padding
from libreflux.probing.settings import LARGE, LARGE_QUICK, QUICK, Changes, Settings, own_guidance, rungs
from libreflux.probing.subjects import read_seen
from libreflux.result_key import digest
from libreflux.sample.metadata import versions
from libreflux.sample.model_key import adapters_key, config_digest, facts_key
from libreflux.workflows.probe_data import ProbeData, check_data
from libreflux.workflows.probe_model import CACHE, ProbedModel
from libreflux.workflows.probe_options import ProbeOptions
from libreflux.workflows.probe_own import own_measures
from libreflux.workflows.probe_trained import check_places, check_training, places_of

logger = get_logger(__name__)

DTYPES = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}
FOLDERS = ("data", CACHE, "drawn", "pictures", "sections")
"""Of a result."""


def measure(
    options: ProbeOptions,
    model: ProbedModel,
    trained_subjects: tuple[str, ...] | None = None,
    weakened: float = 1.0,
) -> tuple[Path, Result]:
    """Measures a model alone, and writes its probe.json.

    Args:
        options: of the probe.
        model: what `read_model` makes of them.
        trained_subjects: what goes before the subjects that the model itself says it was trained on; None: nothing.
        weakened: every guidance is multiplied by it as pictures are drawn. Other than 1 it is a control: what is
            drawn is measured, in the same folder, and no probe.json is written.

    Returns:
        The result's folder and the result.
    """
    device = pick_device(options.device)
    out = out_of(options, model)
    judge_file = _judge_file(options, model)
    judge = _judge(options, judge_file)
    check_data(model, None if options.data is None else Path(options.data))
    check_places(places_of(options.trained_on))
    reader = Reader() if options.ocr else None
    own = own_measures(options.measures)
    settings = _settings(options, model, judge_file, trained_subjects)
    settings = dataclasses.replace(
        settings, reader=None if reader is None else reader.name, measures=tuple(one.row for one in own)
    )
    with lock(out), contextlib.ExitStack() as bars:
        data = ProbeData.make(
            model,
            None if options.data is None else Path(options.data),
            settings=settings,
            judge=judge,
            out=out,
            device=device,
            progress=options.progress,
        )
        model.memory.save()

        def opened(todo: Sequence[Section]) -> ProbeContext:
            with explained(f"reading the model onto {device}", probe_run.SMALLER):
                texts = _padding_texts(model, data, device) if padding.SECTION in todo else {}
                release(device)  # the text encoders, before the transformer comes
                context = open_context(model, data, judge, out, device, texts, weakened)
                context.reader = reader
                return context

        trained, pairs = None, list[Picture]()
        if weakened == 1:
            trained, pairs = check_training(places_of(options.trained_on), model, data, judge, out, options.progress)
        result = probe_run.probe(
            out,
            opened,
            model=model.as_json(),
            decided=_decided(model, data.cache, weakened),
            settings=data.settings,
            prompts=data.prompts,
            versions=versions(),
            trained=trained,
            pairs=pairs,
            names=data.names,
            own=[one.section() for one in own],
            by_unit=options.against is not None or options.csv is not None,
            control=weakened != 1,
            progress=bars.enter_context(options.progress("probing", "evaluation")),
        )
    return out, result


def read_model(options: ProbeOptions) -> ProbedModel:
    """The model of these options, see `ProbedModel.read`; a device and a folder that can be used are made sure of."""
    make_current(pick_device(options.device))
    if options.out is not None:
        try_out(Path(options.out))  # before the weights' checksum
    model = ProbedModel.read(options.model, options.adapters, None if options.out is None else Path(options.out))
    try_out(out_of(options, model))
    return model


def out_of(options: ProbeOptions, model: ProbedModel) -> Path:
    """The folder of the model's result."""
    return model.own_out if options.out is None else Path(options.out)


def try_out(out: Path) -> None:
    """Raises RunError unless a result can be written, or continued, there."""
    folder_place(out, *FOLDERS)
    for name in (FILE, "index.html"):
        file_place(out / name)


def open_context(
    model: ProbedModel,
    data: ProbeData,
    judge: Judge | None,
    out: Path,
    device: torch.device,
    padding_texts: PaddingTexts,
    weakened: float = 1.0,
) -> ProbeContext:
    """Loads the weights, puts the adapters on them, and gives all of it to the measures."""
    transformer = model.source.load_transformer(dtype=DTYPES[data.settings.dtype], device=device)
    # In fp32, as the pipeline has it: it is small beside the transformer.
    vae = model.source.load_vae(dtype=torch.float32, device=device)
    for file, weight in model.files:
        attach_file(transformer, file, weight, dtype=transformer.dtype)
    how = [data.settings.resolution, data.settings.dtype, data.settings.batch]
    return ProbeContext(
        transformer=transformer.eval(),
        vae=vae,
        facts=model.facts,
        settings=data.settings,
        held_out=data.held_out,
        prompts=data.prompts,
        texts=data.cache.text,
        out=out,
        identity=digest([_decided(model, data.cache, weakened), how]),
        older_identity=digest([model.as_json() | {"name": ""}, *how, *([weakened] if weakened != 1 else [])]),
        subjects=data.subjects,
        padding_texts=padding_texts,
        judge=judge,
        weakened=weakened,
    )


def _decided(model: ProbedModel, cache: Cache, weakened: float) -> dict[str, Any]:
    """Of the model and the prepared data what decides a measure; the cache knows VAE, text encoders and tokens."""
    return {
        "transformer": model.sha256,
        "transformer_config": config_digest(model.source.path / "transformer" / "config.json"),
        "adapters": adapters_key(model.files),
        "facts": facts_key(model.facts),
        "cache": cache.settings,
        "drawing": drawing.FORMULA,
        **({} if weakened == 1 else {"weakened": weakened}),
    }


def _judge_file(options: ProbeOptions, model: ProbedModel) -> Path | None:
    if options.judge is not None:
        return Path(options.judge)
    if options.features is not None or options.data is not None or not model.family:
        return None
    from libreflux.emoji.held_out import JUDGE

    if JUDGE.is_file():
        return JUDGE
    logger.warning("this installation has no judge: accuracy and distances are not measured")
    return None


def _judge(options: ProbeOptions, judge_file: Path | None) -> Judge | None:
    if options.features is not None:
        return load_features(Path(options.features))
    return None if judge_file is None else load_judge(judge_file)


def _settings(
    options: ProbeOptions, model: ProbedModel, judge_file: Path | None, trained_subjects: tuple[str, ...] | None
) -> Settings:
    named = options.named_settings()
    changed: Changes = {**(QUICK if options.quick else {}), **(LARGE if model.large else {})}
    changed |= LARGE_QUICK if model.large and options.quick else {}
    if "resolution" not in named:
        config = part_folder(model.source.path, "vae") / "config.json"
        changed["resolution"] = own_side(json_object(config), config)
    own = own_guidance(model.facts)
    changed |= {"own_guidance": own, "diversity_guidance": tuple(sorted({1.0, own}))}
    changed |= named | {"seed": options.seed, "dtype": options.dtype}
    told = None if judge_file is None else sha256_file(judge_file)
    settings = Settings(**changed, judge=features_digest(Path(options.features)) if options.features else told)
    seen = trained_subjects or model.trained_subjects
    if options.seen is not None:
        seen = read_seen(Path(options.seen))
    return dataclasses.replace(settings, rungs=rungs(model.facts, settings.sigmas), seen=seen)


def _padding_texts(model: ProbedModel, data: ProbeData, device: torch.device) -> PaddingTexts:
    # In fp32, so that figures of a card and a CPU compare; T5-XXL does not fit a card whole then.
    resting = device.type != "cpu"
    encoders = model.source.load_text(dtype=torch.float32, device=device, by_block=resting)
    return padding.encode(encoders, model.facts, data.captions, data.settings)

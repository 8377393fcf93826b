"""What few steps are checked on: new pictures, and prompts outside of them, encoded once for each way to read text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from libreflux.data.cache_spec import CacheSpec
from libreflux.data.crops import View, bucket_step
from libreflux.data.held_out import HeldOut
from libreflux.data.prepare import prepare
from libreflux.data.prompts import read_prompts
from libreflux.data.sources import require_folder
from libreflux.errors import DataError, OptionError
from libreflux.files import sha256_file
from libreflux.model.latents import own_side
from libreflux.model.locate import part_folder
from libreflux.model.parts import json_object
from libreflux.printing import counted, get_logger
from libreflux.probing.features import features_digest, load_features
from libreflux.probing.few_steps import LEAST_PICTURES, LEAST_PROMPTS
from libreflux.probing.judges import Judge, load_judge
from libreflux.probing.settings import Settings, own_guidance
from libreflux.probing.subjects import parse_prompt
from libreflux.recipe import DataSource
from libreflux.result_key import digest
from libreflux.workflows.few_steps_models import Subject, Subjects
from libreflux.workflows.few_steps_options import FewStepsOptions
from libreflux.workflows.probe_data import ProbeData
from libreflux.workflows.probe_model import ProbedModel
from libreflux.workflows.progress import Report

logger = get_logger(__name__)

Place = tuple[str, str, int]
"""A model's name, text padding and tokens: what decides how texts are read."""


@dataclass(frozen=True)
class JudgeFile:
    """Who sees the pictures, and a digest of what decides that."""

    judge: Judge
    sha256: str


def judge_of(options: FewStepsOptions, model: ProbedModel) -> JudgeFile:
    """The judge that is named, or the emoji family's own.

    Raises:
        OptionError: none for a model that is not of the family.
    """
    if options.features is not None:
        return JudgeFile(load_features(Path(options.features)), features_digest(Path(options.features)))
    path = None if options.judge is None else Path(options.judge)
    if path is None and model.family:
        from libreflux.emoji.held_out import JUDGE

        path = JUDGE
    if path is None:
        hint = "name the folder of a local CLIP, DINO or other vision model"
        raise OptionError(f"{model.name} is not of the emoji family, whose judge we have", "features", hint=hint)
    return JudgeFile(load_judge(path), sha256_file(path))


def other_prompts(options: FewStepsOptions) -> list[str]:
    """The prompts that are drawn, each once.

    Raises:
        DataError: no such file, or fewer than two prompts.
    """
    path = Path(os.path.expanduser(str(options.prompts)))
    found = list(dict.fromkeys(read_prompts(path)))[: options.count]
    if len(found) < LEAST_PROMPTS:
        hint = f"write {LEAST_PROMPTS} prompts or more, one a line"
        raise DataError(f"has {counted(len(found), 'prompt')}", where=path, hint=hint)
    return found


def check_places(options: FewStepsOptions) -> None:
    """Raises DataError where the folder of new pictures, or the file of prompts, is not there."""
    require_folder(Path(os.path.expanduser(str(options.data))))
    other_prompts(options)


def place_of(subject: Subject) -> Place:
    """How a model reads texts."""
    facts = subject.model.facts
    return subject.model.name, facts.text_padding, facts.max_tokens


def encoded(
    options: FewStepsOptions, subjects: Subjects, judge: JudgeFile, device: torch.device, report: Report
) -> dict[Place, ProbeData]:
    """The new pictures and all prompts as every model reads them; the distilled model's come first."""
    prompts = other_prompts(options)
    found: dict[Place, ProbeData] = {}
    for one in (subjects.distilled, *subjects.adapted, subjects.broken):
        if (place := place_of(one)) not in found:
            folder = options.result / ("cache" if not found else f"cache-{digest(list(place))[:8]}")
            found[place] = _encoded(options, one.model, subjects, judge, prompts, folder, device, report)
    first = next(iter(found.values()))
    same = sorted(set(first.captions) & set(prompts))
    if same:
        logger.warning(
            "%s of the new pictures among the prompts that are to be outside of them: %s",
            counted(len(same), "caption"),
            same[0],
        )
    return found


def _encoded(
    options: FewStepsOptions,
    model: ProbedModel,
    subjects: Subjects,
    judge: JudgeFile,
    prompts: Sequence[str],
    cache_folder: Path,
    device: torch.device,
    report: Report,
) -> ProbeData:
    folder = Path(os.path.expanduser(str(options.data)))
    config = part_folder(model.source.path, "vae") / "config.json"
    side = options.resolution or own_side(json_object(config), config)
    view = View("centre", side, bucket_step(side))
    spec = CacheSpec(
        model=model.source,
        data=[DataSource(path=str(folder), caption_dropout=0.0)],
        views=[view],
        text_padding=model.facts.text_padding,
        out=cache_folder,
        prompts=list(prompts),
        max_tokens=model.facts.max_tokens,
        text_precision="fp32",  # figures of a card and of a CPU are compared
    )
    cache, sources = prepare(spec, device=str(device), progress=report)
    held_out = HeldOut(cache, sources, view=view, count=options.pictures)
    if len(held_out) < LEAST_PICTURES:
        hint = f"give {LEAST_PICTURES} captioned pictures or more"
        raise DataError(f"has {counted(len(held_out), 'picture')}", where=folder, hint=hint)
    batch = options.batch or (1 if model.large else 32)
    captions = [text for part in held_out.batches(batch) for text in part.captions]
    ids = tuple(name for part in held_out.batches(batch) for name in part.sample_ids)
    own = own_guidance(subjects.distilled.model.facts)
    settings = Settings(
        seed=options.seed,
        pictures=len(held_out),
        prompts=len(prompts),
        guidance=(1.0, 3.0),
        draw_steps=subjects.steps,
        steps=(subjects.steps,),
        own_guidance=own,
        resolution=side,
        batch=batch,
        dtype=options.dtype,
        data=(folder.name, digest([list(held_out.sample_ids), captions])),
        judge=judge.sha256,
    )
    parsed = [parse_prompt(text, judge.judge.questions) for text in prompts]
    return ProbeData(settings, held_out, cache, parsed, captions, tuple(judge.judge.subjects), ids)

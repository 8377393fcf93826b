"""What `probe` does between its arguments and its table: pictures, prompts, text, model."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from libreflux.adapter.io import AdapterFile, attach_file
from libreflux.cli.probe_data import CACHE, ProbeData
from libreflux.cli.progress import progress
from libreflux.data.cache import Cache
from libreflux.data.digests import FileMemory
from libreflux.decided import digest
from libreflux.files import lock, sha256_file
from libreflux.model.device import make_current, pick_device, release
from libreflux.model.facts import Facts
from libreflux.model.faults import explained
from libreflux.model.latents import own_side
from libreflux.model.locate import EMOJI, locate, part_folder
from libreflux.model.parts import json_object, visible
from libreflux.model.source import open_model, weights_hash
from libreflux.model.text import check_trained_padding
from libreflux.places import file_place, folder_place
from libreflux.printing import get_logger
from libreflux.probing import drawing
from libreflux.probing import run as probe_run
from libreflux.probing.context import PaddingTexts, ProbeContext
from libreflux.probing.features import features_digest, load_features
from libreflux.probing.judges import Judge, load_judge
from libreflux.probing.metrics import padding
from libreflux.probing.results import FILE, Result
from libreflux.probing.section import Section
from libreflux.probing.settings import LARGE, LARGE_QUICK, QUICK, Settings, own_guidance, rungs
from libreflux.probing.subjects import read_seen
from libreflux.sample.metadata import versions
from libreflux.sample.model_key import adapters_key, config_digest, facts_key
from libreflux.workflows.adapters import adapted_facts, load_arguments, notice_other_base

logger = get_logger(__name__)

DTYPES = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}
PROBES = Path("out/probe")
FOLDERS = ("data", CACHE, "drawn", "pictures", "sections")
"""Of a result."""
LARGE_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of the verb; `chosen` are settings that the user named, `told_seen` goes before a model's own."""

    model: str
    adapters: Sequence[str] = ()
    data: Path | None = None
    out: Path | None = None
    quick: bool = False
    seen: Path | None = None
    told_seen: tuple[str, ...] | None = None
    judge: Path | None = None
    features: Path | None = None
    seed: int = 0
    dtype: str = "stored"
    device: str = "auto"
    chosen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """The model, before its weights are loaded."""

    name: str
    folder: Path
    facts: Facts
    sha256: str
    files: list[tuple[AdapterFile, float]]
    family: bool
    memory: FileMemory

    @property
    def slug(self) -> str:
        """A folder's name for it."""
        return _slug(self.name, self.files)

    @property
    def trained_subjects(self) -> tuple[str, ...] | None:
        """Subjects that it says it was trained on."""
        told = self.facts.lineage.get("trained_subjects")
        return tuple(map(str, told)) if isinstance(told, list) and told else None

    def as_json(self) -> dict[str, Any]:
        rows = [{"name": Path(f.where).name, "sha256": f.sha256, "weight": weight} for f, weight in self.files]
        return {
            "name": self.name,
            "sha256": self.sha256,
            "adapters": rows,
            "steps": self.facts.steps,
            "guidance": self.facts.guidance,
            "text_padding": self.facts.text_padding,
            "distilled_from": self.facts.lineage.get("distilled_from"),
        }


def run(request: Request) -> tuple[Path, Result]:
    """Does what the verb was asked for; returns the result's folder and the result."""
    device = pick_device(request.device)
    make_current(device)
    if request.out is not None:
        try_out(request.out)  # before the weights' hash
    subject = subject_of(request)
    out = request.out or PROBES / subject.slug
    try_out(out)
    judge_file = _judge_file(request, subject)
    judge = _judge(request, judge_file)
    settings = _settings(request, subject, judge_file)
    with lock(out), contextlib.ExitStack() as bars:
        data = ProbeData.make(
            subject.name, subject.facts, subject.family, request.data,
            settings=settings, judge=judge, out=out, device=device,
        )  # fmt: skip
        settings = data.settings
        subject.memory.save()

        def open_context(todo: Sequence[Section]) -> ProbeContext:
            with explained(f"reading the model onto {device}", probe_run.SMALLER):
                texts = _padding_texts(subject, data, device) if padding.SECTION in todo else {}
                release(device)  # the text encoders, before the transformer comes
                return _open(request, subject, data, judge, out, device, texts)

        result = probe_run.probe(
            out, open_context, model=subject.as_json(), decided=_decided(subject, data.cache), settings=settings,
            prompts=data.prompts, versions=versions(), progress=bars.enter_context(progress("probing", "evaluation")),
        )  # fmt: skip
    return out, result


def _decided(subject: Subject, cache: Cache) -> dict[str, Any]:
    """Of the model and the prepared data what decides a measure; the cache knows VAE, text encoders and tokens."""
    return {
        "transformer": subject.sha256,
        "transformer_config": config_digest(subject.folder / "transformer" / "config.json"),
        "adapters": adapters_key(subject.files),
        "facts": facts_key(subject.facts),
        "cache": cache.settings,
        "drawing": drawing.FORMULA,
    }


def try_out(out: Path) -> None:
    """Raises RunError unless a result can be written, or continued, there."""
    folder_place(out, *FOLDERS)
    for name in (FILE, "index.html"):
        file_place(out / name)


def subject_of(request: Request) -> Subject:
    files = load_arguments(request.adapters)
    facts = adapted_facts(open_model(request.model).facts, files)
    check_trained_padding(facts.text_padding)
    folder = locate(request.model)
    memory = FileMemory((request.out or PROBES / _slug(request.model, files)) / CACHE)
    sha256 = weights_hash(folder, memory.sha256)
    notice_other_base(sha256, files)
    return Subject(request.model, folder, facts, sha256, files, _is_family(request.model, folder), memory)


def _slug(name: str, files: Sequence[tuple[AdapterFile, float]]) -> str:
    names = [Path(name).name, *(Path(file.where).resolve().parent.name for file, _ in files)]
    return re.sub(r"[^\w.+-]+", "-", "+".join(names)).strip(".-") or "model"


def _is_family(name: str, folder: Path) -> bool:
    """Whether a model draws in the emoji family's latents: it has the very VAE."""
    if name in EMOJI:
        return True
    here, ours = (visible(part_folder(each, "vae"), "*.safetensors") for each in (folder, locate(EMOJI[0])))
    sizes = [[file.stat().st_size for file in files] for files in (here, ours)]
    return sizes[0] == sizes[1] and [sha256_file(f) for f in here] == [sha256_file(f) for f in ours]


def _judge_file(request: Request, subject: Subject) -> Path | None:
    if request.features is not None or request.judge is not None or request.data is not None or not subject.family:
        return request.judge
    from libreflux.emoji.held_out import JUDGE

    if JUDGE.is_file():
        return JUDGE
    logger.warning("this installation has no judge: accuracy and distances are not measured")
    return None


def _judge(request: Request, judge_file: Path | None) -> Judge | None:
    if request.features is not None:
        return load_features(request.features)
    return None if judge_file is None else load_judge(judge_file)


def _settings(request: Request, subject: Subject, judge_file: Path | None) -> Settings:
    files = visible(subject.folder / "transformer", "*.safetensors")
    large = sum(file.stat().st_size for file in files) > LARGE_BYTES
    changed: dict[str, Any] = {**(QUICK if request.quick else {}), **(LARGE if large else {})}
    changed |= LARGE_QUICK if large and request.quick else {}
    if "resolution" not in request.chosen:
        config = part_folder(subject.folder, "vae") / "config.json"
        changed["resolution"] = own_side(json_object(config), config)
    own = own_guidance(subject.facts)
    changed |= {"own_guidance": own, "diversity_guidance": tuple(sorted({1.0, own}))}
    changed |= dict(request.chosen) | {"seed": request.seed, "dtype": request.dtype}
    told = None if judge_file is None else sha256_file(judge_file)
    settings = Settings(**changed, judge=features_digest(request.features) if request.features else told)
    return dataclasses.replace(settings, rungs=rungs(subject.facts, settings.sigmas), seen=_seen(request, subject))


def _seen(request: Request, subject: Subject) -> tuple[str, ...] | None:
    if request.seen is not None:
        return read_seen(request.seen)
    return subject.trained_subjects if request.told_seen is None else request.told_seen


def _padding_texts(subject: Subject, data: ProbeData, device: torch.device) -> PaddingTexts:
    # In fp32, so that figures of a card and a CPU compare; T5-XXL does not fit a card whole then.
    resting = device.type != "cpu"
    encoders = open_model(subject.name).load_text(dtype=torch.float32, device=device, by_block=resting)
    return padding.encode(encoders, subject.facts, data.captions, data.settings)


def _open(
    request: Request,
    subject: Subject,
    data: ProbeData,
    judge: Judge | None,
    out: Path,
    device: torch.device,
    padding_texts: PaddingTexts,
) -> ProbeContext:
    source = open_model(request.model)
    transformer = source.load_transformer(dtype=DTYPES[request.dtype], device=device)
    # In fp32, as the pipeline has it: it is small beside the transformer.
    vae = source.load_vae(dtype=torch.float32, device=device)
    for file, weight in subject.files:
        attach_file(transformer, file, weight, dtype=transformer.dtype)
    how = [data.settings.resolution, data.settings.dtype, data.settings.batch]
    return ProbeContext(
        transformer=transformer.eval(),
        vae=vae,
        facts=subject.facts,
        settings=data.settings,
        held_out=data.held_out,
        prompts=data.prompts,
        texts=data.cache.text,
        out=out,
        identity=digest([_decided(subject, data.cache), how]),
        older_identity=digest([subject.as_json() | {"name": ""}, *how]),
        subjects=data.subjects,
        padding_texts=padding_texts,
        judge=judge,
    )

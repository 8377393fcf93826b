"""The models of a health check of few steps: the distilled one, the adapted ones, and one that is broken."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux import files
from libreflux.adapter.facts import adapted_facts
from libreflux.adapter.io import AdapterFile
from libreflux.adapter.lineage import lacking
from libreflux.adapter.noise import noise_like
from libreflux.data.digests import FileMemory
from libreflux.errors import AdapterError, LibrefluxError, OptionError, OptionHint
from libreflux.model.facts import Facts
from libreflux.model.locate import PARTS
from libreflux.model.opening import open_model
from libreflux.model.text import check_trained_padding
from libreflux.printing import get_logger
from libreflux.sample.model_key import adapters_key
from libreflux.training import checkpoint, run_recipe
from libreflux.values import adapter_argument
from libreflux.workflows.adapters import check_base, load_arguments
from libreflux.workflows.few_steps_options import FEW, FewStepsOptions
from libreflux.workflows.probe_model import CACHE, ProbedModel, is_family

logger = get_logger(__name__)

Loaded = list[tuple[AdapterFile, float]]
"""Adapters with their weights."""


@dataclass(frozen=True)
class Subject:
    """A model that draws: what it is called, its facts, and its adapters, whose tensors are read when it draws.

    Attributes:
        name: in tables.
        model: with adapters without tensors.
        step: of training; None where nobody says.
        noise: the adapter in memory that noise is; None: all are files.
    """

    name: str
    model: ProbedModel
    key: Sequence[Any] = ()
    step: int | None = None
    noise: AdapterFile | None = None

    def adapters(self) -> Loaded:
        """With their tensors.

        Raises:
            AdapterError: a file that is another one by now.
        """
        if self.noise is not None:
            return [(self.noise, self.model.files[0][1])]
        found = load_arguments([f"{file.where}:{weight}" for file, weight in self.model.files], training_adapters=True)
        for (file, _), (known, _) in zip(found, self.model.files, strict=True):
            if file.sha256 != known.sha256:
                raise AdapterError("was replaced while it was checked", where=file.where, hint="run this again")
        return found


@dataclass(frozen=True)
class Subjects:
    """All that is drawn with.

    Attributes:
        distilled: the model that all is compared with.
        adapted: the checkpoints by step, or one.
        broken: what 0 % kept is.
        steps: all draw in so many.
    """

    distilled: Subject
    adapted: tuple[Subject, ...]
    broken: Subject
    steps: int


def read_subjects(options: FewStepsOptions) -> Subjects:
    """Reads adapters and facts; no weights but for their checksum.

    Raises:
        AdapterError: an adapter that cannot be read, a training adapter, or one of other weights.
        ModelError: no such model.
        OptionError: a distilled model of many steps.
    """
    out = options.result
    given = list[tuple[Loaded, list[list[Any]]]]()
    for texts in _points(options.named):
        last = load_arguments(texts)
        given.append((_light(last), adapters_key(last)))  # of a long curve no more than one point's tensors are held
    distilled = ProbedModel.read(options.against or options.model, (), out)
    steps = options.steps or distilled.facts.steps
    if options.steps is None and steps > FEW:
        told = f"{distilled.name} draws in {steps} steps: it is no few-step model"
        raise OptionError(told, "few_steps", hint="name a distilled one, or say how many `steps` are meant")
    adapted = tuple(_adapted(options, loaded, key, distilled, out) for loaded, key in given)
    broken = _broken(options, distilled, last, adapted[-1])
    plain = dataclasses.replace(distilled, source=distilled.source.with_facts(distilled.facts))
    return Subjects(Subject(distilled.name, plain), adapted, broken, steps)


def _points(named: Sequence[str]) -> list[list[str]]:
    """The adapters of each point of the curve: of one run every whole checkpoint, else all that are named together."""
    if len(named) != 1:
        return [list(named)]
    path, weight = adapter_argument(named[0])
    run = Path(os.path.expanduser(path))
    if not (run / run_recipe.RECIPE).is_file():
        return [list(named)]
    found = {}
    for one in checkpoint.listed(run):
        try:
            files.verify_manifest(one.path)
        except (LibrefluxError, FileNotFoundError) as damage:
            logger.warning("%s is left out: %s", one.path.name, damage)
        else:
            found[one.step] = one.adapter
    result = run / checkpoint.ADAPTER
    if result.is_file():
        found[_step_of(load_arguments([str(result)], training_adapters=True)[0][0]) or 0] = result
    return [[f"{found[step]}:{weight}"] for step in sorted(found)] or [list(named)]


def _step_of(file: AdapterFile) -> int | None:
    told = file.metadata.get("step", "")
    return int(told) if told.isdecimal() else None


def _light(loaded: Loaded) -> Loaded:
    return [(dataclasses.replace(file, tensors={}), weight) for file, weight in loaded]


def _adapted(
    options: FewStepsOptions, loaded: Loaded, key: list[list[Any]], distilled: ProbedModel, out: Path
) -> Subject:
    """The model under these adapters; it draws as the distilled one does, but for the text padding of its own."""
    source = open_model(options.model)
    facts = adapted_facts(source.facts, loaded)
    check_trained_padding(facts.text_padding)
    source.fetch(*PARTS)
    memory = FileMemory(out / CACHE)
    sha256 = source.hash_with(memory.sha256)
    source = source.with_facts(_drawing(distilled.facts, facts))
    if options.against is None:
        for file, _ in loaded:
            _check_weights(file, sha256, source.name, source.facts.lineage, [one for one, _ in loaded])
    check_base(source, sha256, loaded)
    model = ProbedModel(source, sha256, loaded, is_family(source), memory)
    step = _step_of(loaded[0][0]) if len(loaded) == 1 else None
    names = " + ".join(Path(file.where).stem for file, _ in loaded) or source.name
    called = names if step is None else f"step {step:,}"
    weight = f" at {loaded[0][1]:g}" if len(loaded) == 1 and loaded[0][1] != 1 else ""
    return Subject(called + weight, model, key, step)


def _drawing(distilled: Facts, own: Facts) -> Facts:
    return dataclasses.replace(distilled, text_padding=own.text_padding, max_tokens=own.max_tokens)


def _check_weights(
    file: AdapterFile, sha256: str, name: str, lineage: dict[str, Any], together: Sequence[AdapterFile]
) -> None:
    if lacking(sha256, lineage, file, together) is not None:
        return
    told = f"was trained on other weights ({file.metadata.get('model', 'an unnamed model')}) than those of {name}"
    hint = OptionHint(f"check it on its own model; to look at it on {name} all the same, add `against` {name}")
    raise AdapterError(told, where=file.where, hint=hint)


def _broken(options: FewStepsOptions, distilled: ProbedModel, last: Loaded, adapted: Subject) -> Subject:
    if options.broken is not None:
        loaded = load_arguments([options.broken], training_adapters=True)
        check_base(distilled.source, distilled.sha256, loaded)
        facts = _drawing(distilled.facts, adapted_facts(distilled.facts, loaded))
        model = dataclasses.replace(distilled, source=distilled.source.with_facts(facts), files=_light(loaded))
        return Subject(f"broken: {Path(loaded[0][0].where).stem}", model, adapters_key(loaded))
    [(file, weight)] = last
    noise = noise_like(file, options.seed)
    source = distilled.source.with_facts(adapted.model.facts)
    model = dataclasses.replace(distilled, source=source, files=[(noise, weight)])
    return Subject("broken: noise of the same norm", model, [[json.dumps(noise.sha256), weight]], noise=noise)

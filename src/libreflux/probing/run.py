"""The sections of a probe, one after another; finished ones are kept, and the same command goes on after them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.errors import OptionHint
from libreflux.files import atomic_write_json
from libreflux.model.device_faults import explained
from libreflux.model.numerics import pinned
from libreflux.probing.context import ProbeContext
from libreflux.probing.results import Measure, Picture, Result, write_result
from libreflux.probing.section import Section, SectionResult
from libreflux.probing.sections import diversity, guidance, letters, negative, padding, steps, velocity_metrics
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt
from libreflux.probing.trained import TrainingCheck
from libreflux.result_key import digest

SECTIONS: tuple[Section, ...] = (
    velocity_metrics.SECTION,
    guidance.SECTION,
    steps.SECTION,
    diversity.SECTION,
    padding.SECTION,
    negative.SECTION,
    letters.SECTION,
)

OWN = "measures"
"""The setting that names the user's own measures."""
Progress = Callable[[int, int, str], None]
"""progress(done, total, section): samples that went through the model."""


def probe(
    out: Path,
    open_context: Callable[[Sequence[Section]], ProbeContext],
    *,
    model: Mapping[str, Any],
    decided: Mapping[str, Any],
    settings: Settings,
    prompts: Sequence[ParsedPrompt],
    versions: Mapping[str, str],
    trained: TrainingCheck | None = None,
    pairs: Sequence[Picture] = (),
    names: Mapping[str, Sequence[str]] | None = None,
    own: Sequence[Section] = (),
    by_unit: bool = False,
    control: bool = False,
    progress: Progress = lambda done, total, note: None,
) -> Result:
    """Measures whatever `out/sections` does not hold yet, and writes `out/probe.json`.

    Args:
        out: the result's folder.
        open_context: the sections to do → the model with what they need; not called when none is left.
        model: of the result: which weights and adapters.
        decided: what of the model and of the prepared data decides the numbers; names and paths are not among it.
        settings: of the result.
        prompts: the prompts to draw.
        versions: of the result.
        trained: of the result; decides no number.
        pairs: measured pictures and those of the training that are nearest to them.
        names: of the result.
        own: the user's measures; no other section knows of them.
        by_unit: what each picture gave is needed: sections of older versions, which did not keep it, are made anew.
        control: measure what is drawn by guidance alone, into files of its own; no `out/probe.json` is written.
        progress: told how far the model is.
    """
    sections = [*(one for one in SECTIONS if one.wanted(settings)), *own]
    sections = [one.as_control() for one in sections if one.drawn] if control else sections
    keys = {one.name: _key(one, decided, settings) for one in sections}
    for one in sections:
        _adopt_section(out, one.name, keys[one.name], digest([model, settings.as_json(), one.name, one.version]))
    kept = {one.name: read_section(out, one.name, keys[one.name]) for one in sections}
    todo = [one for one in sections if kept[one.name] is None or (by_unit and _is_older(kept[one.name]))]
    if todo:
        context = open_context(todo)
        counter = _Counter(_passes(todo, context, settings, prompts), progress)
        context.advance = counter.advance
        for section in todo:
            counter.note, began = section.name, time.monotonic()
            with _on_its_device(context, section.name):
                found = section.measure(context)
            write_section(out, section.name, keys[section.name], found, time.monotonic() - began)
            kept[section.name] = read_section(out, section.name, keys[section.name])
    parts = [part for part in kept.values() if part is not None]
    result = Result(
        model=model,
        settings=settings.as_json(),
        versions=versions,
        seconds=sum(seconds for _, seconds in parts),
        measures=[row for found, _ in parts for row in found.measures],
        pictures=[*(row for found, _ in parts for row in found.pictures), *pairs],
        trained=trained,
        names=names or {},
        folder=out,
    )
    if not control:
        write_result(out, result)
    return result


def _key(section: Section, decided: Mapping[str, Any], settings: Settings) -> str:
    told = settings.as_json() | {"data": settings.data[1]}  # without the name of its folder
    others = {OWN, *(each.setting for each in SECTIONS)}
    told = {name: value for name, value in told.items() if name not in others}
    told |= {} if section.setting is None else {section.setting: getattr(settings, section.setting)}
    code = {"code": section.code} if section.code else {}
    return digest({"decided": decided, "settings": told, "section": section.name, "version": section.version} | code)


def _adopt_section(out: Path, name: str, key: str, older: str) -> None:
    """Keeps a section of the first versions, whose key had less in it, under today's key."""
    if (known := read_section(out, name, older)) is not None:
        write_section(out, name, key, *known)


SMALLER = OptionHint("a smaller `batch` or `resolution`, `dtype` bf16, or `device` cpu")


@contextmanager
def _on_its_device(context: ProbeContext, name: str) -> Iterator[None]:
    """Measured with what is pinned for training too; what the device raises is one line."""
    device, settings = context.transformer.device, context.settings
    doing = f"{name}, batch {settings.batch}, resolution {settings.resolution}, device {device}"
    with pinned(device), explained(doing, SMALLER, "run the same command again: finished sections are kept"):
        yield


def _is_older(kept: tuple[SectionResult, float] | None) -> bool:
    """Whether a section has measures, none of which says what it was counted over."""
    measures = [] if kept is None else kept[0].measures
    return bool(measures) and all(one.count is None for one in measures)


def section_file(out: Path, name: str) -> Path:
    """Where a finished section is kept."""
    return out / "sections" / f"{name}.json"


def write_section(out: Path, name: str, key: str, found: SectionResult, seconds: float) -> None:
    """Keeps a finished section."""
    rows = {
        "schema": 1,
        "key": key,
        "seconds": seconds,
        "measures": [row.as_json() for row in found.measures],
        "pictures": [row.as_json() for row in found.pictures],
    }
    atomic_write_json(section_file(out, name), rows)


def read_section(out: Path, name: str, key: str) -> tuple[SectionResult, float] | None:
    """A finished section and its seconds; None if it is not there, damaged, of another key, or lacks a picture."""
    try:
        rows = plainjson.parse(section_file(out, name).read_text(encoding="utf-8"))
        if rows["schema"] != 1 or rows["key"] != key:
            return None
        found = SectionResult(
            [Measure.from_json(row) for row in rows["measures"]],
            [Picture.from_json(row, out) for row in rows["pictures"]],
        )
        whole = all((out / picture.file).is_file() for picture in found.pictures)
        return (found, float(rows["seconds"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _passes(todo: Sequence[Section], context: ProbeContext, settings: Settings, prompts: Sequence[ParsedPrompt]) -> int:
    plans = [section.plan(settings, prompts) for section in todo]
    pictures = {digest(each.as_json()): each for plan in plans for each in plan.drawings}
    drawn = sum(each.passes for each in pictures.values() if not context.has_drawn(each))
    return drawn + sum(plan.passes for plan in plans)


class _Counter:
    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.done, self.note, self._progress = total, 0, "", progress

    def advance(self, samples: int) -> None:
        self.done += samples
        self._progress(self.done, max(self.total, self.done), self.note)

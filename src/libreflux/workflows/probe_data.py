"""What a model is probed with: held-out pictures and prompts, from a folder or from the emoji family."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from libreflux.data.cache import Cache
from libreflux.data.cache_spec import CacheSpec
from libreflux.data.crops import View, bucket_step
from libreflux.data.folders import CAPTIONS, walk
from libreflux.data.held_out import HeldOut
from libreflux.data.prepare import Sources, prepare
from libreflux.data.sources import read_lists, read_sidecar, require_folder
from libreflux.errors import DataError, OptionError
from libreflux.probing.judges import SUBJECT, Judge
from libreflux.probing.metrics.letters import quoted
from libreflux.probing.sections import negative
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt, parse_prompt
from libreflux.recipe import DataSource
from libreflux.result_key import digest
from libreflux.workflows.probe_model import CACHE, ProbedModel
from libreflux.workflows.progress import Progress, Report


@dataclass(frozen=True)
class ProbeData:
    """Held-out pictures and prompts, encoded, before any transformer is loaded.

    Attributes:
        settings: with what is known now: digests, how many pictures and prompts there are.
        held_out: the pictures.
        cache: holds their latents and every text.
        prompts: the prompts to draw.
        captions: of the pictures.
        subjects: every known subject's name.
        ids: of the pictures, in the captions' order.
    """

    settings: Settings
    held_out: HeldOut
    cache: Cache
    prompts: list[ParsedPrompt]
    captions: list[str]
    subjects: tuple[str, ...]
    ids: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, list[str]]:
        """Of what measures count, see `Result.names`."""
        return {
            "pictures": list(self.ids),
            "captions": list(self.captions),
            "prompts": [one.text for one in self.prompts],
        }

    @staticmethod
    def make(
        model: ProbedModel,
        data: Path | None,
        *,
        settings: Settings,
        judge: Judge | None,
        out: Path,
        device: torch.device,
        progress: Progress,
    ) -> ProbeData:
        """Reads and encodes what is not encoded yet; `data` None is the emoji family's own.

        Raises:
            DataError: fewer than two pictures or captions, or whatever `prepare` refuses.
        """
        known = tuple(judge.subjects) if judge is not None else ()
        folder, texts = data, None
        if folder is None:
            folder, texts, known = _family_data(settings, out)
        known = tuple(dict.fromkeys([*known, *(settings.seen or ())]))
        with progress("preparing", "item") as report:
            cache, sources = _prepare(model, folder, (), out, settings, device, report)
            held_out = _held_out(cache, sources, settings)
            captions = [text for part in held_out.batches(settings.batch) for text in part.captions]
            texts = texts or _prompts(captions, settings, folder)
            questions = dict(judge.questions) if judge is not None else {}
            if judge is None or judge.subjects:  # a judge that is asked for no subject can tell none
                questions[SUBJECT] = known
            prompts = [parse_prompt(text, questions) for text in texts]
            needed = [*texts]
            if judge is not None:
                needed += negative.texts(prompts[: settings.negative_prompts], judge.subjects, judge.colours)
            cache, sources = _prepare(model, folder, needed, out, settings, device, report)
            held_out = _held_out(cache, sources, settings)
        if len(held_out) < 2 or len(prompts) < 2:
            raise DataError("fewer than two pictures or captions", where=folder, hint="give more of them")
        origin = (folder.name if data else "emoji", digest([held_out.sample_ids, captions, texts]))
        counted = dataclasses.replace(settings, data=origin, pictures=len(held_out), prompts=len(prompts))
        ids = tuple(name for part in held_out.batches(settings.batch) for name in part.sample_ids)
        return ProbeData(counted, held_out, cache, prompts, captions, known, ids)


def check_data(model: ProbedModel, data: Path | None) -> None:
    """Refuses what cannot be measured with, before there is a result's folder.

    Raises:
        OptionError: no data for a model that is not of the emoji family.
        DataError: no such folder.
    """
    if data is not None:
        require_folder(Path(os.path.expanduser(data)))
    elif not model.family:
        hint = "name a folder of captioned pictures that it was not trained on"
        raise OptionError("is not of the emoji family, whose pictures we have", "data", hint=hint)


def check_quotes(folder: Path) -> None:
    """Refuses a folder of pictures none of whose captions quotes a text, before anything else is read.

    Raises:
        OptionError: none does.
        DataError: no such folder, or captions that cannot be read.
    """
    folder = Path(os.path.expanduser(folder))
    require_folder(folder)
    found = walk(folder)
    listed = (row.caption for rows in read_lists(found.lists).values() for row in rows)
    beside = (picture.with_suffix(CAPTIONS[0]) for picture in found.pictures)
    files = itertools.chain((file for file in beside if file.is_file()), *found.sidecars.values())
    captions = itertools.chain(listed, (caption for file in files for caption in read_sidecar(file)))
    if not any(map(quoted, captions)):
        raise OptionError(f"no caption in {folder} quotes a text", "ocr", hint=QUOTE_HINT)


QUOTE_HINT = 'write what is to be drawn in double quotes: a sign that says "OPEN"'


def _prompts(captions: Sequence[str], settings: Settings, folder: Path) -> list[str]:
    """The captions to draw; where text is read, those that quote one come first."""
    distinct = list(dict.fromkeys(captions))
    if settings.reader is None:
        return distinct[: settings.prompts]
    found = sorted(distinct, key=lambda text: not quoted(text))[: settings.prompts]
    if sum(bool(quoted(text)) for text in found) < 2:
        what = f"fewer than two of the {len(distinct)} captions that are measured in {folder} quote a text"
        raise OptionError(what, "ocr", hint=f"more `pictures`, or more captions that do; {QUOTE_HINT}")
    return found


def _family_data(settings: Settings, out: Path) -> tuple[Path, list[str], tuple[str, ...]]:
    from libreflux.emoji import held_out

    folder = held_out.write_held_out(out / "data" / f"emoji-{settings.pictures}", settings.pictures)
    return folder, held_out.prompts(settings.prompts), held_out.subject_names()


def _prepare(
    model: ProbedModel,
    folder: Path,
    prompts: Sequence[str],
    out: Path,
    settings: Settings,
    device: torch.device,
    report: Report,
) -> tuple[Cache, Sources]:
    spec = CacheSpec(
        model=model.source,
        data=[DataSource(path=str(folder), caption_dropout=0.0)],
        views=[view_of(settings)],
        text_padding=model.facts.text_padding,
        out=out / CACHE,
        prompts=prompts,
        max_tokens=model.facts.max_tokens,
        text_precision="fp32",  # figures of a card and of a CPU are compared
    )
    return prepare(spec, device=str(device), progress=report)


def view_of(settings: Settings) -> View:
    """The crop that pictures are measured in."""
    return View("centre", settings.resolution, bucket_step(settings.resolution))


def _held_out(cache: Cache, sources: Sources, settings: Settings) -> HeldOut:
    return HeldOut(cache, sources, view=view_of(settings), count=settings.pictures)

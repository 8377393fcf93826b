"""Captions of a folder of pictures by a vision-language model, local or served. Resumed by the same call."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux.captioning.wanted import wanted_captions
from libreflux.errors import DataError
from libreflux.workflows.caption_options import CaptionOptions, check_options
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.prepare import parse_part

if TYPE_CHECKING:
    from libreflux.captioning.asking import Asker, OpenPicture, Question
    from libreflux.captioning.endpoint import Client
    from libreflux.captioning.lists import Known

TIMEOUT = 300.0
TOGETHER = 8
_REMEMBERED = 32  # opened pictures, of 3 MB at the usual side
_DECIDING = ("max_tokens", "temperature", "tries", "seed", "side")


@dataclass(frozen=True, kw_only=True)
class CaptionResult:
    """What is there now.

    Attributes:
        file: metadata.jsonl with the captions.
        pictures: of this part.
        written: captions that this call made.
        kept: captions of these names that were there before it.
        skipped: pictures that were left alone, because they have other captions.
        failed: (picture, caption's name, why) of captions of these names that this part got no usable answer for.
        uncaptioned: pictures of this part that have no caption at all; `prepare` refuses a folder with such pictures.
        failures: the file that lists what failed, of all parts and names; None where nothing did.
        page: pictures and captions, to be read through.
        part: (i, n): the i-th of n parts, from 0; (0, 1) is all.
    """

    file: Path
    pictures: int
    written: int
    kept: int
    skipped: int
    failed: Sequence[tuple[str, str, str]]
    uncaptioned: int
    failures: Path | None
    page: Path
    part: tuple[int, int]


def caption_with(options: CaptionOptions) -> CaptionResult:
    """Write captions of pictures into their folder's metadata.jsonl, which `prepare` and `train` read.

    A picture is asked about once for each caption that it lacks. Answers that are empty, repeat themselves, refuse or
    are cut by the limit of tokens are tried again, drawn with another seed, and listed in the end. Interrupted or
    killed, the same call goes on.

    Raises:
        OptionError: a value out of range, an option that has no effect, a caption without a prompt.
        DataError: no picture there, or lists and side-cars that cannot be read.
        ModelError: not such a model.
        RunError: the folder is in use or cannot be written, or the server cannot go on.

    Example::

        import libreflux

        made = libreflux.caption("photos", model="my-vlm", captions=["short", "mood=Which mood has it? One word."])
        print(made.written, made.page)
    """
    check_options(options)
    wanted, part = wanted_captions(options.captions), parse_part(options.shard)

    from libreflux.captioning.journal import KEPT, part_lock
    from libreflux.data.folders import METADATA, walk
    from libreflux.data.sources import in_part, require_folder
    from libreflux.places import file_place, folder_place

    root = Path(os.path.normpath(Path(options.data).expanduser()))
    require_folder(root)
    page = root / KEPT / "index.html" if options.page is None else Path(options.page)
    folder_place(root, KEPT)
    file_place(root / METADATA)
    file_place(page)
    pictures = [path.relative_to(root) for path in walk(root).pictures]
    if not pictures:
        raise DataError("no picture in this folder", where=root, hint="check the path")
    files = [picture.as_posix() for picture in pictures if in_part(picture, part)]
    chosen = _choose_model(options)
    with part_lock(root / KEPT, part):
        return _Job(options, root, page, part, files, wanted, chosen).run()


@dataclass(frozen=True)
class _ChosenModel:
    """Who is asked: its name, what decides its answers, and where it is."""

    name: str
    decides: Mapping[str, Any]
    folder: Path | None = None
    client: Client | None = None


def _choose_model(options: CaptionOptions) -> _ChosenModel:
    if options.endpoint is not None:
        from libreflux.captioning.endpoint import Client, Endpoint, own_key
        from libreflux.captioning.server import served_model

        client = Client(Endpoint.parse(options.endpoint), own_key(), options.timeout or TIMEOUT)
        name = options.model or served_model(client, None)
        return _ChosenModel(name, {"model": name, "served": True}, client=client)
    from libreflux.captioning.vision_folder import find_vision_model, identity

    named = str(options.model)
    folder = find_vision_model(named)
    name = Path(named).name if Path(named).expanduser().is_dir() else named
    kept = {"dtype": options.dtype, "quantize": options.quantize}
    return _ChosenModel(name, {"model": name, "identity": identity(folder), **kept}, folder=folder)


@dataclass(frozen=True)
class _Job:
    """The captions of one part, whose folder is locked."""

    options: CaptionOptions
    root: Path
    page: Path
    part: tuple[int, int]
    files: Sequence[str]
    wanted: Mapping[str, str]
    chosen: _ChosenModel

    def run(self) -> CaptionResult:
        """Asks for what is missing, and shows what there is."""
        from libreflux.captioning.journal import FAILED, KEPT
        from libreflux.captioning.lists import (
            known_captions,
            made_captions,
            merge_left_journals,
            merge_own_journal,
            read_failed,
        )
        from libreflux.data.folders import METADATA, walk
        from libreflux.workflows import caption_page

        merge_own_journal(self.root, walk(self.root), self.part)
        merge_left_journals(self.root, walk(self.root))
        digests = self._note_settings()
        known = known_captions(self.root, walk(self.root))
        missing, kept, skipped = self._missing(known, digests)
        written = self._ask(missing, kept, digests) if missing else 0
        found, kept_folder = walk(self.root), self.root / KEPT
        captioned = known_captions(self.root, found)
        # What was written by hand since is missing no more; what was to be overwritten still has its older caption.
        failed = [one for one in read_failed(kept_folder) if one.over or one.name not in captioned.of(one.file)]
        open_small = opener(self.root, caption_page.SIDE, 1)
        caption_page.write(self.page, self.root, made_captions(self.root, found), failed, open_small)
        own, failures = set(self.files), kept_folder / FAILED
        return CaptionResult(
            file=self.root / METADATA,
            pictures=len(self.files),
            written=written,
            kept=kept,
            skipped=skipped,
            failed=[
                (one.file, one.name, str(one.fault)) for one in failed if one.file in own and one.name in self.wanted
            ],
            uncaptioned=sum(not captioned.of(file) for file in self.files),
            failures=failures if failed else None,
            page=self.page,
            part=self.part,
        )

    def _note_settings(self) -> dict[str, str]:
        """Caption's name to the digest of all that decides it, which is kept beside what it stands for."""
        from libreflux.captioning.journal import KEPT
        from libreflux.files import atomic_write_json
        from libreflux.result_key import digest

        numbers = {name: getattr(self.options, name) for name in _DECIDING}
        digests = {}
        for name, prompt in self.wanted.items():
            settings = {**self.chosen.decides, **numbers, "prompt": prompt}
            digests[name] = digest(settings)[:16]
            path = self.root / KEPT / "settings" / f"{digests[name]}.json"
            if not path.is_file():
                atomic_write_json(path, {"schema": 1, "caption": name, **settings})
        return digests

    def _missing(self, known: Known, digests: Mapping[str, str]) -> tuple[list[Question], int, int]:
        """Questions, how many captions are there, and how many pictures are left alone."""
        from libreflux.captioning.asking import Question

        questions, kept, skipped = [], 0, 0
        for file in self.files:
            there = known.of(file)
            if self.options.existing == "skip" and there.keys() - self.wanted.keys():
                skipped += 1
                continue
            for name, prompt in self.wanted.items():
                anew = self.options.existing == "overwrite" and there.get(name) != digests[name]
                if name in there and not anew:
                    kept += 1
                elif known.failed.get((file, name)) != digests[name]:
                    questions.append(Question(file, name, prompt))
        return questions, kept, skipped

    def _ask(self, questions: Sequence[Question], kept: int, digests: Mapping[str, str]) -> int:
        """Asks, and writes answers down; returns how many captions that were."""
        from libreflux.captioning.asking import settle
        from libreflux.captioning.journal import KEPT, Entry, Journal, part_folder
        from libreflux.captioning.lists import merge_own_journal
        from libreflux.data.folders import walk

        asker = self._asker()
        journal = Journal(part_folder(self.root / KEPT, self.part))
        written, total, over = 0, kept + len(questions), self.options.existing == "overwrite"
        try:
            with (
                self.options.progress("captioning", "caption") as report,
                contextlib.closing(settle(questions, asker, self.options.tries)) as settled,
            ):
                report(kept, total, begun=True)
                for done, one in enumerate(settled, kept + 1):
                    asked, by = one.question, digests[one.question.name]
                    journal.add(Entry(asked.file, asked.name, one.caption, by, one.fault, asked.attempt + 1, over))
                    written += one.fault is None
                    failed = done - kept - written
                    report(done, total, f"{failed} failed" if failed else "")
        finally:
            merge_own_journal(self.root, walk(self.root), self.part)
        return written

    def _asker(self) -> Asker:
        from libreflux.captioning.asking import Wording

        options = self.options
        wording = Wording(options.max_tokens, float(options.temperature), options.seed)
        if self.chosen.client is not None:
            from libreflux.captioning.server import Server, served_model

            together = options.batch or TOGETHER
            served_model(self.chosen.client, self.chosen.name)  # whether it is there at all
            shown = opener(self.root, options.side, min(2 * together, _REMEMBERED))
            return Server(self.chosen.client, self.chosen.name, wording, shown, together)
        from libreflux.captioning.vision_model import VisionModel, load_vision_model
        from libreflux.model.device import make_current, pick_device

        assert self.chosen.folder is not None
        device = pick_device(options.device)
        make_current(device)
        together = options.batch or (1 if device.type == "cpu" else TOGETHER)
        loaded = load_vision_model(self.chosen.folder, options.dtype, options.quantize, device)
        return VisionModel(loaded, wording, opener(self.root, options.side, min(2 * together, _REMEMBERED)), together)


def opener(root: Path, side: int, remembered: int) -> OpenPicture:
    """Opens pictures of a folder: upright sRGB, on white where they are transparent, made smaller but never larger.

    Args:
        root: the folder.
        side: of the longer side, at most, in pixels.
        remembered: pictures that are kept: several questions are about one.
    """
    from PIL import Image

    from libreflux.data.pictures import load_rgb

    @functools.lru_cache(remembered)
    def opened(file: str) -> Image.Image:
        picture = load_rgb(root / file)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.info.clear()  # Pillow writes a file's comment into what it saves
        return picture

    return opened


caption = by_keywords(CaptionOptions, caption_with)

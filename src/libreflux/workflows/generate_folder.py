"""A captioned folder drawn by a model: pictures of many prompts, as data for training. Resumed by the same call."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux import seeding
from libreflux.errors import OptionError
from libreflux.workflows import picture_options
from libreflux.workflows.generate import common_record
from libreflux.workflows.generate_options import DrawingOptions, check_numbers, check_words
from libreflux.workflows.guidance_options import first_model
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import adapter_texts, named_model

if TYPE_CHECKING:
    from PIL import Image

    from libreflux.data.digests import FileMemory
    from libreflux.flow.solve import Step
    from libreflux.sample.metadata import GenerationRecord
    from libreflux.workflows.drawing import AdaptedSource, DrawingSession
    from libreflux.workflows.drawn_folder import DrawnFolder
    from libreflux.workflows.progress import Report

MOST_PICTURES = 1_000_000
"""Of one folder: their names have six digits."""
MOST_TOGETHER = 4096
AT_ONCE = 256
"""Prompts that are encoded and held together: of 512 tokens each they take 2 GiB."""
_NOT_DECIDING = ("schema", "prompt", "prompt_2", "seed", "model", "dtype", "device", "hashes", "adapters", "versions")
"""Fields of a record that differ between pictures, that the key holds in another way, or that decide last bits."""


@dataclass(frozen=True)
class GenerateFolderOptions(DrawingOptions):
    """What a folder is drawn from, and how.

    Attributes:
        prompts_from: a text file with one prompt a line, a .jsonl like metadata.jsonl, or a folder of captioned
            pictures, whose captions are drawn.
        out: folder to write or continue: numbered PNG files, a .txt beside each, and metadata.jsonl.
        count: pictures in all: the prompts in order, again from the first with other seeds. None: one of each prompt.
        seed: each picture's own is a function of this one and of its number.
        batch: pictures drawn together, which decides the last bits.
    """

    prompts_from: str | Path
    _: KW_ONLY
    out: str | Path
    count: int | None = None
    seed: int = 0
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class GenerateFolderResult:
    """What is there now.

    Attributes:
        folder: PNG files, a .txt beside each, and metadata.jsonl.
        pictures: how many.
        drawn: how many of them were drawn by this call.
    """

    folder: Path
    pictures: int
    drawn: int


def generate_folder_with(options: GenerateFolderOptions) -> GenerateFolderResult:
    """Draw a captioned folder, which `prepare` and `train` read; called again, it goes on where it stopped.

    A picture depends on the model, the settings, its prompt, `seed` and its own number: not on `count`, nor on
    interruptions. Pictures that are there and whole are kept.

    Raises:
        OptionError: a value out of range, or an option that has no effect; before anything large is loaded.
        DataError: prompts that cannot be read.
        RunError: a folder that was begun with something else, which is named, or that has other files in it.
        ModelError, AdapterError: see `generate_with`.

    Example::

        from pathlib import Path

        import libreflux

        Path("prompts.txt").write_text("a fox on yellow\\nan owl on blue\\n", encoding="utf-8")
        drawn = libreflux.generate_folder("prompts.txt", count=4, steps=4, out="drawn")
        print(drawn.pictures, drawn.drawn)  # 4 4
    """
    from libreflux.data.prompts import read_prompts
    from libreflux.workflows.drawn_folder import DrawnFolder

    _check(options)
    listed = read_prompts(Path(options.prompts_from))
    picture_options.check_prompts(listed, options.negative)
    count = len(listed) if options.count is None else int(options.count)
    if count > MOST_PICTURES:
        raise OptionError(f"is {count:,}", "count", hint=f"draw at most {MOST_PICTURES:,} into a folder")
    folder = DrawnFolder(Path(options.out))
    folder.check_place()
    check_numbers(options)

    from libreflux.data.digests import FileMemory
    from libreflux.files import lock
    from libreflux.workflows.adapters import default_model
    from libreflux.workflows.drawing import open_for_drawing

    adapters = adapter_texts(options.adapters)
    named = named_model(options.model, options.base, options.comfyui) or default_model(adapters)
    how = options.device, options.offload, options.quantize, options.offload_blocks, options.compile, options.on_notice
    first = first_model(options)
    source = open_for_drawing(named, adapters, *how, first)
    record = common_record(options, source)
    record = dataclasses.replace(record, model=str(named), batch=int(options.batch))
    memory = FileMemory(folder.memory)
    decided = _decided(options, source, record, listed, memory)
    with lock(folder.out):
        folder.begin(decided, count)
        memory.save()
        pictures = _Pictures(listed, int(options.seed), record)
        drawn = _draw_missing(options, folder, pictures, count, source, memory)
        prompts, seeds = zip(*(pictures.of(index) for index in range(count)), strict=True)
        folder.finish(prompts, seeds)
    return GenerateFolderResult(folder=folder.out, pictures=count, drawn=drawn)


def _check(options: GenerateFolderOptions) -> None:
    picture_options.check_whole("seed", options.seed, 0)
    picture_options.check_whole("batch", options.batch, 1, MOST_TOGETHER)
    if options.count is not None:
        picture_options.check_whole("count", options.count, 1, MOST_PICTURES)
    if Path(options.out).suffix.lower() == ".png":
        raise OptionError(f"{options.out} is a picture's name", "out", hint="name a folder")
    check_words(options)
    prompts, out = (Path(os.path.realpath(os.path.expanduser(path))) for path in (options.prompts_from, options.out))
    if prompts.is_dir() and out.is_relative_to(prompts):
        what = f"{options.out} lies in {options.prompts_from}, from which the prompts are read: it would add to them"
        raise OptionError(what, "out", hint="name a folder elsewhere")


@dataclass(frozen=True)
class _Pictures:
    """Of each number, its prompt, its seed and its record."""

    prompts: Sequence[str]
    seed: int
    common: GenerationRecord

    def of(self, index: int) -> tuple[str, int]:
        """Prompt, and a seed of 53 bits: a number that every reader of JSON keeps whole."""
        seed = seeding.key(self.seed, "drawn picture", index) >> 11
        return self.prompts[index % len(self.prompts)], seed

    def record(self, index: int) -> GenerationRecord:
        """How it is drawn."""
        prompt, seed = self.of(index)
        return dataclasses.replace(self.common, prompt=prompt, seed=seed)


def _decided(
    options: GenerateFolderOptions,
    source: AdaptedSource,
    record: GenerationRecord,
    prompts: Sequence[str],
    memory: FileMemory,
) -> dict[str, Any]:
    """Everything that the pictures are functions of, but for their last bits, which device and versions decide too."""
    from libreflux.model.w8a8 import kind_for
    from libreflux.result_key import digest
    from libreflux.sample.metadata import told_fields
    from libreflux.sample.model_key import FORMULA, adapters_key, facts_key, first_steps_key, model_key

    fields = {name: value for name, value in told_fields(record).items() if name not in _NOT_DECIDING}
    del fields["compile"]  # is known with the weights, and decides last bits
    if not 0 < record.guidance < 1:
        del fields["below_one"]  # it says nothing there, and older folders go on without it
    if options.quantize == "w8a8":
        fields["quantize"] = f"w8a8 {kind_for(source.device)}"
    if source.first is not None:
        fields["first_steps_from"] = first_steps_key(fields["first_steps_from"], source.first.source, memory)
    model = {f"model ({part})": value for part, value in model_key(source.source, memory).items()}
    return {
        "formula": FORMULA,
        "prompts": digest(list(prompts)),
        "seed": int(options.seed),
        **fields,
        "metadata": bool(options.metadata),
        **model,
        "adapters": adapters_key(source.files),
        **{f"model's {name}": value for name, value in facts_key(source.facts).items()},
    }


def _draw_missing(
    options: GenerateFolderOptions,
    folder: DrawnFolder,
    pictures: _Pictures,
    count: int,
    source: AdaptedSource,
    memory: FileMemory,
) -> int:
    """Draws what is not there, and returns how many pictures that were.

    Pictures are drawn in groups of `batch` by their numbers, the last one whole too: so a picture shares its batch with
    the same others whatever `count` is, and whatever was there already.
    """
    missing = {index for index in range(count) if not folder.has(index, pictures.of(index)[0])}
    if not missing:
        return 0
    size = pictures.common.batch
    groups = [range(size * group, size * (group + 1)) for group in sorted({index // size for index in missing})]
    passes = pictures.common.passes * len(groups)
    done = count - len(missing)
    for part in _parts(groups, pictures):
        with options.progress("encoding", "prompt") as told:
            records = [pictures.record(index) for group in part for index in group]
            session = source.load(records, memory.sha256, told, passes)
        with options.progress("drawing", "picture") as report:
            report(done, count, begun=True)
            for group in part:
                note = _Note(report, done, count, pictures.common.steps)
                done += _draw_group(options, folder, pictures, session, [*group], missing, note)
                report(done, count)
        del session  # before the encoders come again
    return len(missing)


def _parts(groups: Sequence[range], pictures: _Pictures) -> Iterator[list[range]]:
    """Groups of at most `AT_ONCE` prompts together, or one group."""
    part, prompts = list[range](), set[str]()
    for group in groups:
        own = {pictures.of(index)[0] for index in group}
        if part and len(prompts | own) > AT_ONCE:
            yield part
            part, prompts = [], set()
        part.append(group)
        prompts |= own
    yield part


def _draw_group(
    options: GenerateFolderOptions,
    folder: DrawnFolder,
    pictures: _Pictures,
    session: DrawingSession,
    group: Sequence[int],
    missing: Container[int],
    note: _Note,
) -> int:
    """Draws a group, and writes what is missing of it; returns how many that were."""
    written = 0
    for index, image, record in _drawn(session, [pictures.record(index) for index in group], group, note):
        if index not in missing:
            continue
        path = folder.write(index, image, record if options.metadata else None, pictures.of(index)[0])
        if options.on_picture is not None:
            options.on_picture(path)
        written += 1
    return written


def _drawn(
    session: DrawingSession, records: Sequence[GenerationRecord], indexes: Sequence[int], note: _Note
) -> Iterator[tuple[int, Image.Image, GenerationRecord]]:
    images = session.draw_together(records, note)
    return zip(indexes, images, map(session.stamped, records), strict=True)


@dataclass(frozen=True)
class _Note:
    """Tells of each step beside the count of pictures."""

    report: Report
    done: int
    total: int
    steps: int

    def __call__(self, step: Step) -> None:
        self.report(self.done, self.total, f"step {step.index + 1} of {self.steps}")


generate_folder = by_keywords(GenerateFolderOptions, generate_folder_with)

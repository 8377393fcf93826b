"""Composed emoji pictures with captions, as an ordinary captioned folder."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from libreflux.errors import DataError, OptionError
from libreflux.places import folder_place, new_place
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import check_whole
from libreflux.workflows.progress import Progress, silent


@dataclass(frozen=True)
class DemoDataOptions:
    """Which pictures.

    Attributes:
        out: folder to write; it must not exist yet, or be empty.
        count: number of pictures, at least 1.
        seed: other seeds compose other pictures.
        look: "plain", or "pencil", which emoji-base has never seen.
        pairs: share of pictures with two subjects, in [0, 1].
        progress: shows how far it is.
    """

    out: Path | str
    _: KW_ONLY
    count: int = 400
    seed: int = 0
    look: str = "plain"
    pairs: float = 0.2
    progress: Progress = field(default=silent, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class DemoDataResult:
    """What was written.

    Attributes:
        folder: PNG files, a .txt beside each, and metadata.jsonl.
        pictures: how many.
    """

    folder: Path
    pictures: int


def demo_data_with(options: DemoDataOptions) -> DemoDataResult:
    """Write composed emoji pictures with captions: PNG, side-car .txt and metadata.jsonl.

    Raises:
        DataError: the folder exists and is not empty.
        OptionError: a count, seed, look or share that there is not.

    Example::

        import libreflux

        print(libreflux.demo_data("pictures", count=8, seed=1).pictures)  # 8
    """
    out = Path(options.out)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise DataError("already exists", where=out, hint="choose another name or remove it")
    if out.is_dir():
        folder_place(out.absolute().parent)  # the finished folder takes its place by a rename
    else:
        new_place(out)
    from libreflux.emoji import compose
    from libreflux.files import staged_dir

    _check(options, tuple(compose.LOOKS))
    out = out.absolute()
    if out.is_dir():
        try:
            out.rmdir()  # empty: the finished folder takes its place by a rename
        except OSError as error:
            raise DataError(f"cannot be replaced ({error.strerror})", where=out, hint="name a new folder") from None
    with staged_dir(out) as staging, options.progress("composing", "picture") as report:
        compose.write_folder(
            staging, options.count, options.seed, pairs=options.pairs, look=options.look, progress=report
        )
    return DemoDataResult(folder=out, pictures=options.count)


def _check(options: DemoDataOptions, looks: tuple[str, ...]) -> None:
    if options.look not in looks:
        raise OptionError(f"no look {options.look!r}", "look", hint=f"use one of {', '.join(looks)}")
    if not isinstance(options.count, int) or options.count < 1:
        raise OptionError("is no number of pictures", "count", hint="give 1 or more")
    if options.seed < 0:
        raise OptionError("is negative", "seed", hint="give 0 or more")
    check_whole("seed", options.seed, 0)
    if not 0 <= options.pairs <= 1:
        raise OptionError("is no share", "pairs", hint="give a number from 0 to 1")


demo_data = by_keywords(DemoDataOptions, demo_data_with)

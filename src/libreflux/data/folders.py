"""What lies in a folder of captioned pictures: pictures, caption files and lists, and by name all that is not read."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from libreflux.data.pictures import FORMATS
from libreflux.errors import DataError

METADATA = "metadata.jsonl"
CAPTIONS = (".txt", ".caption")
"""Side-cars, in whatever case: the second one is kohya's default."""
_OTHERS = (
    "ai arw avif cr2 cr3 dds dng eps exr hdr heic heif icns ico j2k jp2 jpf jpx jxl kra nef nrw orf pbm pcx pef pfm "
    "pgm pnm ppm psd qoi raf raw rw2 srw svg svgz tga xcf"
)
OTHER_PICTURES = frozenset(f".{name}" for name in _OTHERS.split(" "))
OTHER_LISTS = ("metadata.csv", "metadata.parquet")
_OF_A_RUN = frozenset({"averages", "cache", "checkpoints", "samples", "tensorboard"})


@dataclass(slots=True)
class Unread:
    """Files of one kind that nothing reads.

    Attributes:
        suffix: in lower case, with its dot; "" for none.
        count: how many.
        first: by name; one that lies beside a picture or a caption of its name, if one does.
        beside: how many of them do.
    """

    suffix: str
    count: int = 0
    first: Path = field(default_factory=Path)
    beside: int = 0

    def add(self, path: Path, beside: bool) -> None:
        """One more."""
        if not self.count or (beside and not self.beside):
            self.first = path
        self.count += 1
        self.beside += beside


@dataclass
class Folder:
    """What was found below a folder, in the order of names.

    Attributes:
        pictures: of a format that is read.
        lists: metadata.jsonl files.
        sidecars: caption files of a picture but for its ``name.txt``, which most have: of a million each byte counts.
        unread: by suffix.
        left_out: folders that training or preparing wrote.
    """

    pictures: list[Path] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)
    sidecars: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    unread: dict[str, Unread] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)


def walk(folder: Path) -> Folder:
    """What lies in a folder and its sub-folders; what is hidden, and what libreflux wrote there, is left out.

    Raises:
        DataError: a folder that cannot be read, a link to one, a name that is no UTF-8, or a picture or list of a
            format that is not read. A picture beside one of the same name that is read (a raw file beside its JPEG)
            is not refused.
    """
    found = Folder()
    for root, folders, names in os.walk(folder, onerror=_unreadable):
        here = Path(root)
        if _is_ours(folders, names):
            if here != folder:
                found.left_out.append(here)
                folders.clear()
                continue
            found.left_out += [here / name for name in sorted(_OF_A_RUN.intersection(folders))]
            folders[:] = [name for name in folders if name not in _OF_A_RUN]
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in folders:
            if (here / name).is_symlink():
                hint = "name the folder that it leads to as a source of its own, or remove the link"
                raise DataError("links to folders are not followed", where=here / name, hint=hint)
        _sort(here, sorted(name for name in names if not name.startswith(".")), found)
    return found


def _is_ours(folders: Sequence[str], names: Sequence[str]) -> bool:
    run = "recipe.json" in names and ("checkpoints" in folders or "metrics.jsonl" in names)
    cache = "shards" in folders and "index.sqlite3" in names
    return run or cache


def _sort(here: Path, names: Sequence[str], found: Folder) -> None:
    pictures: dict[str, list[Path]] = {}
    captioned: set[str] = set()
    for name in names:
        stem, suffix = _split(name)
        if not name.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in name):
            raise DataError("this file's name is no UTF-8", where=ascii(str(here / name)), hint="rename it")
        if suffix in FORMATS:
            pictures.setdefault(stem, []).append(here / name)
        elif suffix in CAPTIONS:
            captioned.add(stem)
    found.pictures += [here / name for name in names if _split(name)[1] in FORMATS]
    for name in names:
        stem, suffix = _split(name)
        if name == METADATA:
            found.lists.append(here / name)
        elif suffix in CAPTIONS and stem in pictures:
            for picture in pictures[stem] if name != f"{stem}.txt" else ():
                found.sidecars[picture] = (*found.sidecars.get(picture, ()), here / name)
        elif suffix not in FORMATS:
            _refuse(here / name, suffix, stem in pictures)
            beside = stem in pictures or _split(stem)[1] in FORMATS or (stem in captioned and suffix not in CAPTIONS)
            found.unread.setdefault(suffix, Unread(suffix)).add(here / name, beside)


def _split(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


def _refuse(path: Path, suffix: str, has_twin: bool) -> None:
    if suffix in OTHER_PICTURES and not has_twin:
        hint = "convert it to PNG or remove it"
        raise DataError(f"{suffix} pictures are not supported yet", where=path, hint=hint)
    if path.name in OTHER_LISTS:
        hint = f"write the captions into {METADATA} and remove it"
        raise DataError("not supported yet", where=path, hint=hint)


def _unreadable(error: OSError) -> None:
    hint = "make it readable, or move it elsewhere"
    raise DataError(f"cannot be read ({error.strerror})", where=error.filename, hint=hint) from None


def alike(path: Path) -> list[Path]:
    """Files beside `path` that may be meant by it, the likeliest first: in other letters, or of another suffix."""
    try:
        names = sorted(name for name in os.listdir(path.parent) if name != path.name)
    except OSError:
        return []
    wanted, stem = _plain(path.name), _split(_plain(path.name))[0]
    ranked = [name for name in names if _plain(name) == wanted]
    ranked += [name for name in names if _split(_plain(name))[0] == stem or _plain(name).startswith(wanted + ".")]
    return [path.with_name(name) for name in dict.fromkeys(ranked)]


def _plain(name: str) -> str:
    """Names that look alike are equal here: in whatever case, and however accents are written."""
    return unicodedata.normalize("NFC", name).casefold()

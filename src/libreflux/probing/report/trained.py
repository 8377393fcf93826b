"""On the page and in the table: whether the pictures are held out, and the training pictures nearest to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from libreflux.printing import counted, readable, shortened
from libreflux.probing.report import html
from libreflux.probing.results import Picture, Result
from libreflux.probing.trained import TrainingCheck

PURPOSE = "nearest"
HEADS = {
    "measured": "measured",
    "pixels": "nearest by pixels",
    "content": "nearest by content",
    "scene": "nearest scene",
}
SEEN = {
    "file": "the very file was trained on",
    "pixels": "these very pixels were trained on",
    "latents": "its very latents were trained on",
    "scene": "its scene was trained on",
    "cache": "it is in a cache",
}
_EXPLAINED = {
    "pixels": "Pixels: mean absolute difference of thumbnails of 32 x 32 pixels, 0 to 255.",
    "judge": "Content: 1 - cosine of the judge's features, 0 is the same.",
    "latents": "Content: root mean square of the latents' differences.",
}


def remarks(results: Sequence[Result], names: Sequence[str]) -> str:
    """What a title adds of models whose pictures are not held out, or may not be; "" where none is known to be."""
    told = {name: one.remark for one, name in zip(results, names, strict=True) if one.remark}
    if len(results) == 1:
        return "".join(told.values())
    return "; ".join(f"{name}: {remark}" for name, remark in told.items())


def distance_rows(check: TrainingCheck) -> list[tuple[str, str]]:
    """What a table says: how many pictures were trained on, or what else is known, and how near the nearest are."""
    rows = [("held out", check.verdict)]
    if check.seen:
        rows = [("measured pictures that were trained on", f"{check.seen:,} of {len(check.rows):,}")]
    for kind, told in (("pixels", "pixels, of 255"), ("content", f"content ({check.content})"), ("scene", "scene")):
        found = check.distances(kind)
        if len(found):
            median, least = readable(float(np.median(found))), readable(float(found.min()))
            rows.append((f"nearest training picture, {told}: median [least]", f"{median} [{least}]"))
    return rows


def files(results: Sequence[Result]) -> set[Path]:
    """The pictures that `section` shows."""
    return {_file(one, picture) for one in results for picture in one.pictures if picture.purpose == PURPOSE}


def section(results: Sequence[Result], names: Sequence[str], sources: Mapping[Path, bytes]) -> str:
    """HTML of models of whose training something is known; "" if nothing is of any.

    Args:
        results: of the models.
        names: what they are called.
        sources: JPEG of each of `files`.
    """
    parts = []
    for one, name in zip(results, names, strict=True):
        if one.trained is None:
            continue
        rows = html.table(("", ""), [list(row) for row in distance_rows(one.trained)], 1)
        verdict = f"{one.trained.verdict[:1].upper()}{one.trained.verdict[1:]}."
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(verdict)}</p>{rows}{_pairs(one, sources)}")
    if not parts:
        return ""
    known = {"pixels", *(one.trained.content for one in results if one.trained is not None)}
    explained = " ".join(told for kind, told in _EXPLAINED.items() if kind in known)
    return (
        "<h2>Were the pictures held out?</h2><p>A model that was trained on the pictures that it is measured on has "
        "learnt them by heart: its error says little then. These are the measured pictures that are closest to what it "
        f'was trained on.</p><p class="faint">{explained}</p>{"".join(parts)}'
    )


def _pairs(result: Result, sources: Mapping[Path, bytes]) -> str:
    pairs: dict[float, dict[str, Picture]] = {}
    for picture in result.pictures:
        if picture.purpose == PURPOSE:
            pairs.setdefault(float(picture.at["row"]), {})[str(picture.at["what"])] = picture
    if not pairs:
        return ""
    shown = "".join(f"<div>{_pair(result, pair, sources)}</div>" for _, pair in sorted(pairs.items()))
    return f'<div class="grids">{shown}</div>'


def _pair(result: Result, pair: Mapping[str, Picture], sources: Mapping[Path, bytes]) -> str:
    heads = [what for what in HEADS if what in pair]
    top = "".join(f"<th>{HEADS[what]}</th>" for what in heads)
    return f'<table class="pairs"><tr>{top}</tr><tr>{"".join(_cells(result, pair, heads, sources))}</tr></table>'


def _cells(
    result: Result, pair: Mapping[str, Picture], heads: Sequence[str], sources: Mapping[Path, bytes]
) -> Iterator[str]:
    for what in heads:
        picture = pair[what]
        at, name = picture.at, shortened(picture.at["name"], 80)
        told = f"{name}, {readable(float(at['distance']))} away" if "distance" in at else f"“{name}”"
        seen = f"<br><b>{SEEN.get(str(at['seen']), 'trained on')}</b>" if "seen" in at else ""
        shown = html.image(sources[_file(result, picture)], f"{HEADS[what]}: {at['name']}", "jpeg")
        yield f'<td>{shown}<span class="faint">{escape(told)}{seen}</span></td>'


def _file(result: Result, picture: Picture) -> Path:
    if result.folder is None:
        raise ValueError(f"the result of {result.model['name']} has pictures and no folder")
    return result.folder / picture.file


def warning(results: Sequence[Result], names: Sequence[str]) -> str:
    """The first sentence of what was found; "" where nothing is known to be trained on."""
    told = [
        f"{escape(name)}: {one.trained.seen:,} of {counted(len(one.trained.rows), 'picture')}"
        for one, name in zip(results, names, strict=True)
        if one.trained is not None and one.trained.seen
    ]
    if not told:
        return ""
    return (
        f"<b>Not held out.</b> A model was measured on pictures that it was trained on ({'; '.join(told)}). Its error "
        "and its distances say what it has learnt by heart."
    )

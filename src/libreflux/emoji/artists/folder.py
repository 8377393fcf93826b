"""Training scenes as a captioned folder, as they are or under an operation that no model of the family knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from libreflux.emoji.artists import captions, held_out, scenes
from libreflux.emoji.artists.captions import Told
from libreflux.emoji.artists.scenes import PAIRS, Background, Scene
from libreflux.emoji.compose import pencil


def pencil_captions(what: Scene) -> dict[str, str]:
    """True captions of a scene under `pencil`, by kind: on white, and whose drawing it was is told by none.

    All but the long one keep to words that the family's text encoders know; others would hide the subject from the
    model.
    """
    on_white = _on_white(what)
    told = {kind: replace(captions.told_by(on_white, kind), look=False) for kind in ("bare", "short", "full")}
    whole = captions.phrase(on_white, Told(size=True, place=True))
    long = f"The picture is a pencil drawing of {whole}. Only dark outlines are drawn. The background is plain white."
    return {**{kind: captions.phrase(on_white, facts) for kind, facts in told.items()}, "long": long}


@dataclass(frozen=True)
class Look:
    """An operation on composed pictures, the scene that it is made of, and the captions that stay true under it."""

    scene: Callable[[Scene], Scene]
    picture: Callable[[Image.Image], Image.Image]
    captions: Callable[[Scene], dict[str, str]]


def _on_white(what: Scene) -> Scene:
    return replace(what, background=Background("white"))


LOOKS = {
    "plain": Look(lambda what: what, lambda picture: picture, captions.captions),
    "pencil": Look(_on_white, pencil, pencil_captions),
}


def write_folder(
    out: Path,
    count: int,
    seed: int,
    *,
    pairs: float = PAIRS,
    look: str = "plain",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `count` pictures, none of them of a held-out scene: PNG, side-car .txt (a caption a line), metadata.jsonl.

    Args:
        pairs: share of pictures with two subjects.
        look: a key of `LOOKS`; the family has seen none but "plain".
        progress: called with (done, total) after each picture.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        what = held_out.training_scene(seed, index, pairs=pairs)
        name = f"{seed:04d}-{index:06d}"
        LOOKS[look].picture(scenes.render(LOOKS[look].scene(what))).save(out / f"{name}.png")
        texts = LOOKS[look].captions(what)
        (out / f"{name}.txt").write_text("\n".join(texts.values()) + "\n", encoding="utf-8")
        rows.append(json.dumps({"file_name": f"{name}.png", "captions": texts}))
        if progress:
            progress(index + 1, count)
    (out / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out

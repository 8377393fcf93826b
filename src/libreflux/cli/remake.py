"""`libreflux generate --remake PIC.png`: a picture again, from what it says of itself."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from libreflux.cli.drawing import open_for_drawing
from libreflux.cli.generate import picture_targets
from libreflux.cli.options import Offload
from libreflux.cli.progress import progress
from libreflux.errors import DataError, RecipeError
from libreflux.model.locate import told_model
from libreflux.places import file_place
from libreflux.printing import counted, say
from libreflux.sample.checks import check_values
from libreflux.sample.encoding import check_max_tokens
from libreflux.sample.metadata import GenerationRecord, differences, open_png, read_record, save_png
from libreflux.workflows.adapters import adapter_argument
from libreflux.workflows.models import chosen_model


def draw_again(
    picture: Path,
    model: str | None,
    adapters: Sequence[str],
    device: str,
    out: Path,
    *,
    offload: Offload = Offload.auto,
    base: str | None = None,
    comfyui: Path | None = None,
    with_metadata: bool = True,
) -> None:
    """Draw what `picture` tells of into `out`; say what differs from then, and whether the pixels do.

    Args:
        picture: a PNG that `libreflux generate` wrote.
        model: where its model is now; None: where it was.
        adapters: where its adapters are now, in their order; the weights are the picture's.
        device: see `model.device`.
        out: a .png file, or a folder.
        offload: see `cli.options`.
        base, comfyui: see `cli.models`.
        with_metadata: of the new picture.

    Raises:
        DataError: a picture that does not say how it was made.
        RecipeError: adapters that are not as many as it had, or an `out` that would replace it.
    """
    record = read_record(picture)
    _check(record, picture)
    (target,) = picture_targets(out, [record.prompt], [(record.prompt, record.seed)])
    if target != out:
        target = out / f"{picture.stem}-again.png"
    if os.path.exists(target) and os.path.samefile(target, picture):
        raise RecipeError("would replace the picture itself", where=target, hint="name another place with --out")
    file_place(target)
    if model is None and comfyui is None:
        is_file = record.model.lower().endswith(".safetensors")
        model = record.model if is_file else told_model(record.model, picture)
    source = chosen_model(model, base, comfyui)
    assert source is not None
    chosen = open_for_drawing(source, _found(record, adapters, picture), device, offload, record.quantize)
    check_max_tokens(chosen.facts, record.max_tokens, f"{picture}: max_tokens")
    opened = chosen.load([record])
    now = dataclasses.replace(opened.stamped(record), model=str(source))
    changed = differences(record, now)
    for line in changed:
        say(f"{picture}: {line}", err=True)
    with progress("drawing", "step") as report:
        image = opened.draw(now, lambda step: report(step.index + 1, now.steps, ""))
    save_png(image, target, now if with_metadata else None)
    say(target)
    say(_compared(picture, image, changed), err=True)


def _check(record: GenerationRecord, picture: Path) -> None:
    """Raises DataError for numbers that nothing can be drawn with."""
    try:
        check_values({
            "num_inference_steps": record.steps, "sigmas": record.sigmas, "guidance_scale": record.guidance,
            "width": record.width, "height": record.height, "no_cfg_until": record.no_cfg_until,
            "guidance_start": record.guidance_start, "guidance_stop": record.guidance_stop,
            "guidance_rescale": record.guidance_rescale, "embedded_guidance": record.embedded_guidance,
        })  # fmt: skip
    except RecipeError as error:
        what = f"damaged record ({error.where} {error.what})"
        raise DataError(what, where=picture, hint="give the picture unchanged") from None


def _found(record: GenerationRecord, adapters: Sequence[str], picture: Path) -> list[str]:
    """Adapter arguments with the picture's own weights."""
    if len(adapters) != len(record.adapters):
        names = " ".join(f"--adapter {_named(row)}" for row in record.adapters) or "no --adapter"
        raise RecipeError(
            f"drawn with {counted(len(record.adapters), 'adapter')}, not {len(adapters)}",
            where=picture,
            hint=f"give {names}, from where the files are now",
        )
    try:
        weights = [float(row["weight"]) for row in record.adapters]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError("damaged record (adapters)", where=picture, hint="give the picture unchanged") from None
    for text, weight in zip(adapters, weights, strict=True):
        path, given = adapter_argument(text)
        if given not in (1.0, weight):
            what = f"weight {given:g} is not the picture's, {weight:g}"
            hint = f"give --adapter {path}, the picture says it"
            raise RecipeError(what, where=f"--adapter {text}", hint=hint)
    return [f"{adapter_argument(text)[0]}:{weight!r}" for text, weight in zip(adapters, weights, strict=True)]


def _named(row: Mapping[str, Any]) -> str:
    """Where an adapter was; its file's name alone in pictures that do not say."""
    path = row.get("path")
    text = path if isinstance(path, str) and path else str(row.get("file"))
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") and len(text) > 2 else shlex.quote(text)


def _compared(picture: Path, image: Image.Image, changed: list[str]) -> str:
    before = np.asarray(open_png(picture).convert("RGB"), dtype=np.int16)
    after = np.asarray(image.convert("RGB"), dtype=np.int16)
    if before.shape != after.shape:
        return f"{picture} has been resized since it was made"
    if (before == after).all():
        return f"bit for bit the pixels of {picture}"
    off = np.abs(before - after)
    why = "" if changed else "; nothing that is recorded has changed: perhaps its text encoders, VAE or pixels have"
    return f"{(off.max(-1) > 0).mean():.2%} of its pixels differ from {picture}, by at most {off.max()} of 255{why}"

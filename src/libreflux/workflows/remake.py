"""A picture again, from what it says of itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from libreflux.errors import DataError, OptionError, OptionHint, RecipeError
from libreflux.model.compile_choice import Compile
from libreflux.model.locate import EMOJI, told_model
from libreflux.model.opening import open_model
from libreflux.places import file_place
from libreflux.printing import counted, quoted_path
from libreflux.sample.checks import check_values, first_steps_argument
from libreflux.sample.encoding import check_max_tokens
from libreflux.sample.metadata import GenerationRecord, differences, open_png, read_record, save_png
from libreflux.sample.rules import nag_of, rule_of
from libreflux.values import adapter_argument
from libreflux.workflows.drawing import open_for_drawing
from libreflux.workflows.guidance_options import GuidanceOptions, check_first_steps, refuse_compiled
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import Offload, OffloadBlocks, adapter_texts, check_memory, named_model
from libreflux.workflows.picture_paths import ANOTHER_PLACE, picture_paths_of
from libreflux.workflows.progress import Progress, silent


@dataclass(frozen=True)
class RemakeOptions:
    """Which picture to draw again, and where its parts are now; all else is as it says of itself.

    Attributes:
        picture: a PNG that `generate` wrote, with its metadata.
        model: where its model is now; None: where it was.
        base, comfyui: see `GenerateOptions`.
        adapters: where its adapters are now, in their order; the weights are the picture's.
        first_steps_from: where the model of its first steps is now; None: where it was.
        device, offload, offload_blocks: see `GenerateOptions`.
        compile: "on" or "off", see `GenerateOptions`; "auto": as the picture was drawn.
        metadata: whether the new PNG says how it was made.
        out: a .png file, or a folder. None writes nothing.
        progress: shows the steps, see `workflows.progress`.
        on_difference: told, before anything is drawn, of each thing that has changed since the picture was made.
        on_picture: told of the new picture's file once it is written.
        on_notice: see `GenerateOptions`.
    """

    picture: str | Path
    _: KW_ONLY
    model: str | Path | None = None
    base: str | None = None
    comfyui: str | Path | None = None
    adapters: str | Path | Sequence[str | Path] = ()
    first_steps_from: str | None = None
    device: str = "auto"
    offload: Offload = "auto"
    offload_blocks: OffloadBlocks = 0
    compile: Compile = "auto"
    metadata: bool = True
    out: str | Path | None = None
    progress: Progress = field(default=silent, repr=False, compare=False)
    on_difference: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    on_picture: Callable[[Path], None] | None = field(default=None, repr=False, compare=False)
    on_notice: Callable[[str], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class RemakeResult:
    """The new picture, and how it compares with the old one.

    Attributes:
        image: RGB.
        record: how it was made.
        path: its file; None where nothing was written.
        differences: what may give it other pixels, a line each: weights, adapters, versions, device.
        same_pixels: whether its pixels are those of the old one, bit for bit.
        comparison: one line that says so, or how far they are from it.
    """

    image: Image.Image = field(repr=False)
    record: GenerationRecord
    path: Path | None
    differences: tuple[str, ...]
    same_pixels: bool
    comparison: str


def remake_with(options: RemakeOptions) -> RemakeResult:
    """Draw again what a picture tells of; find what differs from then, and whether the pixels do.

    Raises:
        DataError: a picture that does not say how it was made, or says what nothing can be drawn with.
        RecipeError: adapters that are not as many as it had, or an `out` that would replace it.
        ModelError, AdapterError, RunError: see `generate_with`.

    Example::

        import libreflux

        libreflux.generate("a fox on yellow", steps=4, out="fox.png")
        again = libreflux.remake("fox.png")
        assert again.same_pixels and not again.differences
    """
    picture = Path(options.picture)
    check_memory(options.offload, None, options.compile, options.offload_blocks)
    record = read_record(picture)
    _check(record, picture)
    target = None if options.out is None else _target(Path(options.out), record, picture)
    model = options.model
    if model is None and options.comfyui is None:
        is_file = record.model.lower().endswith(".safetensors")
        model = record.model if is_file else told_model(record.model, picture)
    named = named_model(model, options.base, options.comfyui) or record.model
    adapters = _found(record, adapter_texts(options.adapters), picture)
    memory = options.offload, record.quantize, options.offload_blocks
    refuse_compiled(record.nag, options.compile)
    asked: Compile = ("on" if record.compile else "off") if options.compile == "auto" else options.compile
    first = _first(record, options.first_steps_from, picture)
    _check_family(record, picture, str(named), first)
    source = open_for_drawing(named, adapters, options.device, *memory, asked, options.on_notice, first)
    try:
        check_max_tokens(source.facts, record.max_tokens, f"{picture}: max_tokens")
    except OptionError as error:
        raise DataError(error.what, where=error.where, hint=error.hint) from None
    session = source.load([record])
    now = dataclasses.replace(session.stamped(record), model=str(named), batch=1)
    if first is not None and record.first_steps_from is not None:
        now = dataclasses.replace(now, first_steps_from=f"{first}:{first_steps_argument(record.first_steps_from)[1]}")
    changed = differences(record, now)
    for line in changed:
        if options.on_difference is not None:
            options.on_difference(line)
    with options.progress("drawing", "step") as report:
        image = session.draw(now, lambda step: report(step.index + 1, now.steps))
    if target is not None:
        save_png(image, target, now if options.metadata else None)
        if options.on_picture is not None:
            options.on_picture(target)
    return RemakeResult(image, now, target, tuple(changed), *_compared(picture, image, changed))


def _check_family(record: GenerationRecord, picture: Path, named: str, first: str | None) -> None:
    """Raises DataError for a picture by a model of the emoji family that was another one then."""
    of_first = None if record.first_steps_from is None else first_steps_argument(record.first_steps_from)[0]
    for part, was, now in (("transformer", record.model, named), ("first_transformer", of_first, first)):
        then = record.hashes.get(part)
        if was == now and now in EMOJI and then is not None and then != open_model(now).hash:
            option = "model" if part == "transformer" else "first_steps_from"
            what = f"was drawn by a former {now}, {then[:10]}, that this version does not have"
            raise DataError(what, where=picture, hint=OptionHint(f"draw its prompt anew, or give a copy by `{option}`"))


def _first(record: GenerationRecord, given: str | None, picture: Path) -> str | None:
    """Who draws the first steps; None is no other model."""
    if record.first_steps_from is None:
        if given is not None:
            raise OptionError(f"was not used for {picture}", "first_steps_from", hint="remove it")
        return None
    model, count = first_steps_argument(record.first_steps_from)
    if given is None:
        return told_model(model, picture)
    named, steps = first_steps_argument(given)
    if named != given and steps != count:
        raise OptionError(f"has other steps than its {count}", "first_steps_from", hint="give the model alone")
    return named


def _target(out: Path, record: GenerationRecord, picture: Path) -> Path:
    """The new picture's file, tried; never the old one."""
    (target,) = picture_paths_of(out, [(record.prompt, record.seed)])
    if target != out:
        target = out / f"{picture.stem}-again.png"
    if os.path.exists(target) and os.path.samefile(target, picture):
        raise RecipeError("would replace the picture itself", where=target, hint=ANOTHER_PLACE)
    file_place(target)
    return target


def _check(record: GenerationRecord, picture: Path) -> None:
    """Raises DataError for numbers that nothing can be drawn with."""
    try:
        check_values(
            {
                "num_inference_steps": record.steps,
                "sigmas": record.sigmas,
                "guidance_scale": record.guidance,
                "width": record.width,
                "height": record.height,
                "no_cfg_until": record.no_cfg_until,
                "guidance_start": record.guidance_start,
                "guidance_stop": record.guidance_stop,
                "guidance_rescale": record.guidance_rescale,
                "embedded_guidance": record.embedded_guidance,
            }
        )
        rule_of(record).check_steps(record.steps)
        nag_of(record)
        _check_told(record)
    except RecipeError as error:
        what = f"damaged record ({error.where} {error.what})"
        raise DataError(what, where=picture, hint="give the picture unchanged") from None


def _check_told(record: GenerationRecord) -> None:
    """Raises OptionError for numbers of NAG and of first steps that a record must have, and has not, or cannot have."""
    first = GuidanceOptions(first_steps_from=record.first_steps_from, first_steps_guidance=record.first_steps_guidance)
    check_first_steps(first, record.steps)
    needed = {"nag_tau": record.nag, "nag_alpha": record.nag, "first_steps_guidance": record.first_steps_from}
    for name, by in needed.items():
        if by and getattr(record, name) is None:
            raise OptionError("is missing", name)


def _found(record: GenerationRecord, adapters: Sequence[str], picture: Path) -> list[str]:
    """Adapter arguments with the picture's own weights."""
    if len(adapters) != len(record.adapters):
        names = " ".join(f"`adapters` {_named(row)}" for row in record.adapters) or "no `adapters`"
        what = f"drawn with {counted(len(record.adapters), 'adapter')}, not {len(adapters)}"
        raise RecipeError(what, where=picture, hint=OptionHint(f"give {names}, from where the files are now"))
    try:
        weights = [float(row["weight"]) for row in record.adapters]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError("damaged record (adapters)", where=picture, hint="give the picture unchanged") from None
    for text, weight in zip(adapters, weights, strict=True):
        path, given = adapter_argument(text)
        if given not in (1.0, weight):
            what = f"weight {given:g} is not the picture's, {weight:g}"
            hint = f"give `adapters` {path}, the picture says it"
            raise OptionError(what, "adapters", value=text, hint=hint)
    return [f"{adapter_argument(text)[0]}:{weight!r}" for text, weight in zip(adapters, weights, strict=True)]


def _named(row: Mapping[str, Any]) -> str:
    """Where an adapter was; its file's name alone in pictures that do not say."""
    path = row.get("path")
    text = path if isinstance(path, str) and path else str(row.get("file"))
    return quoted_path(text)


def _compared(picture: Path, image: Image.Image, changed: Sequence[str]) -> tuple[bool, str]:
    before = np.asarray(open_png(picture).convert("RGB"), dtype=np.int16)
    after = np.asarray(image.convert("RGB"), dtype=np.int16)
    if before.shape != after.shape:
        return False, f"{picture} has been resized since it was made"
    if (before == after).all():
        return True, f"bit for bit the pixels of {picture}"
    off = np.abs(before - after)
    why = "" if changed else "; nothing that is recorded has changed: perhaps its text encoders, VAE or pixels have"
    share = f"{(off.max(-1) > 0).mean():.2%}"
    return False, f"{share} of its pixels differ from {picture}, by at most {off.max()} of 255{why}"


remake = by_keywords(RemakeOptions, remake_with)

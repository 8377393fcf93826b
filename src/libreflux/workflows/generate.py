"""Pictures from prompts, with true classifier-free guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux.errors import OptionError
from libreflux.workflows import picture_options
from libreflux.workflows.generate_options import (
    DrawingOptions,
    GenerateOptions,
    check_numbers,
    given_steps,
    guided_only,
    texts_of_options,
)
from libreflux.workflows.guidance_options import (
    check_first_steps,
    check_zero_init,
    first_fields,
    first_model,
    nag_fields,
    rule_fields,
)
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import adapter_texts, named_model
from libreflux.workflows.picture_paths import picture_paths_of

__all__ = ["GenerateOptions", "GenerateResult", "GeneratedPicture", "generate", "generate_with"]

if TYPE_CHECKING:
    from PIL import Image

    from libreflux.flow.solve import Step
    from libreflux.sample.metadata import GenerationRecord
    from libreflux.workflows.drawing import AdaptedSource, DrawingSession


@dataclass(frozen=True)
class GeneratedPicture:
    """One picture of a result.

    Attributes:
        record: how it was made; what its PNG says, if it says anything.
        image: RGB; None where it was written, so that many pictures need not fit the memory.
        path: its file; None where nothing was written.
    """

    record: GenerationRecord
    image: Image.Image | None = field(repr=False)
    path: Path | None


@dataclass(frozen=True)
class GenerateResult:
    """What was drawn.

    Attributes:
        pictures: `count` of the first prompt, then those of the next.
    """

    pictures: tuple[GeneratedPicture, ...]


def generate_with(options: GenerateOptions) -> GenerateResult:
    """Draw pictures: the same options draw the same pixels, and each record says how its picture was made.

    Pictures are held in memory only where nothing is written (`out` is None).

    Raises:
        OptionError: a value out of range, or an option that has no effect; before anything large is loaded.
        RecipeError, RunError: a place that cannot be written, a device that is not there, memory that ran out.
        ModelError, AdapterError: no such model or adapter, a damaged one, or two that do not fit.

    Example::

        import libreflux

        result = libreflux.generate("a fox on yellow", steps=4, seed=1)
        result.pictures[0].image.save("fox.png")
        libreflux.generate(["a fox", "an owl"], steps=4, guidance=4, negative="yellow", out="pictures")
    """
    prompts, seconds = texts_of_options(options)
    wanted = [(prompt, options.seed + index) for prompt in prompts for index in range(options.count)]
    targets = None if options.out is None else picture_paths_of(Path(options.out), wanted, options.count)
    check_numbers(options)

    from libreflux.workflows.adapters import default_model
    from libreflux.workflows.drawing import open_for_drawing

    adapters = adapter_texts(options.adapters)
    named = named_model(options.model, options.base, options.comfyui) or default_model(adapters)
    memory = options.offload, options.quantize, options.offload_blocks
    how = *memory, options.compile, options.on_notice, first_model(options)
    source = open_for_drawing(named, adapters, options.device, *how)
    common = dataclasses.replace(common_record(options, source), model=str(named))
    records = [
        dataclasses.replace(common, prompt=prompt, prompt_2=seconds[index // options.count], seed=seed)
        for index, (prompt, seed) in enumerate(wanted)
    ]
    session = source.load(records)
    stamped = [session.stamped(record) for record in records]
    return GenerateResult(tuple(_drawn(options, session, stamped, targets)))


def common_record(options: DrawingOptions, source: AdaptedSource) -> GenerationRecord:
    """What all pictures share, with the model's own where nothing was given.

    Args:
        options: of the pictures.
        source: the model, under its adapters, and who draws the first steps.

    Raises:
        OptionError: what this model has no use for, or cannot do.
    """
    from libreflux.sample.encoding import check_max_tokens
    from libreflux.sample.metadata import GenerationRecord

    facts, size = source.facts, source.size
    first = None if source.first is None else source.first.facts
    check_max_tokens(facts, options.max_tokens, "max_tokens")
    if first is not None:
        check_max_tokens(first, options.max_tokens, "max_tokens")
    if options.embedded_guidance is not None and not facts.guidance_embeds:
        what = "has no effect on a model without guidance embedding"
        raise OptionError(what, "embedded_guidance", hint="use `guidance`")
    steps = given_steps(options) or facts.steps
    width, height = options.width or size, options.height or size
    picture_options.check_picture(width, height, steps)
    guidance = facts.cfg_scale if options.guidance is None else float(options.guidance)
    picture_options.refuse_unused(guidance, guided_only(options, first))
    check_zero_init(options, steps)
    check_first_steps(options, steps)
    picture_options.refuse_unguided(steps, options.no_cfg_until, options.guidance_start, options.guidance_stop)
    embedded = facts.embedded_guidance if options.embedded_guidance is None else float(options.embedded_guidance)
    return GenerationRecord(
        prompt="",
        seed=0,
        negative=options.negative,
        steps=int(steps),
        guidance=guidance,
        width=int(width),
        height=int(height),
        model="",
        no_cfg_until=int(options.no_cfg_until),
        guidance_start=float(options.guidance_start),
        guidance_stop=float(options.guidance_stop),
        guidance_rescale=float(options.guidance_rescale),
        **rule_fields(options, guidance),
        **nag_fields(options),
        **first_fields(options, first),
        batch_cfg=options.batch_cfg,
        tile=options.tile,
        embedded_guidance=embedded,
        quantize=options.quantize,
        negative_2=options.negative_2,
        max_tokens=options.max_tokens,
        sigmas=None if options.sigmas is None else [float(sigma) for sigma in options.sigmas],
    )


def _drawn(
    options: GenerateOptions, session: DrawingSession, records: Sequence[GenerationRecord], targets: list[Path] | None
) -> Iterator[GeneratedPicture]:
    from libreflux.sample.metadata import save_png

    total, done = sum(record.steps for record in records), 0
    with options.progress("drawing", "step") as report:
        for index, record in enumerate(records):
            note = f"picture {index + 1}" if len(records) > 1 else ""

            def on_step(step: Step, done: int = done, note: str = note) -> None:
                report(done + step.index + 1, total, note)

            image = session.draw(record, on_step)
            done += record.steps
            if targets is None:
                yield GeneratedPicture(record, image, None)
                continue
            save_png(image, targets[index], record if options.metadata else None)
            if options.on_picture is not None:
                options.on_picture(targets[index])
            yield GeneratedPicture(record, None, targets[index])


generate = by_keywords(GenerateOptions, generate_with)

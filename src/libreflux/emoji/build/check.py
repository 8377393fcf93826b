"""Twenty fixed prompts drawn on an unlabelled sheet: somebody who has not seen them says what is there."""

from __future__ import annotations

from pathlib import Path

from libreflux import seeding
from libreflux.emoji import compose
from libreflux.files import atomic_write_text
from libreflux.model.opening import open_model
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import save_png
from libreflux.sample.pipeline import LibreFluxPipeline

COLUMNS = 5


def prompts() -> list[str]:
    """Twenty subjects, each colour twice, the same every time."""
    rng = seeding.rng(20, "check")
    pool = compose.subjects()
    chosen = [pool[i] for i in rng.choice(len(pool), 20, replace=False)]
    colours = rng.permutation([*compose.COLOURS, *compose.COLOURS])
    return [
        compose.short_caption(compose.Scene(subject, str(colour)))
        for subject, colour in zip(chosen, colours, strict=True)
    ]


def draw(out: Path, model: str = "emoji-base", guidance: float = 3.0, steps: int = 28) -> Path:
    """Write `out/check.png`, numbered 1 to 20 in reading order, and `out/answers.txt`."""
    pipe = LibreFluxPipeline.from_model(open_model(model))
    pipe.set_progress_bar_config(disable=True)
    wanted = prompts()
    drawn = pipe(wanted, guidance_scale=guidance, num_inference_steps=steps, seeds=list(range(len(wanted)))).images
    assert isinstance(drawn, list)
    rows = [drawn[i : i + COLUMNS] for i in range(0, len(drawn), COLUMNS)]
    starts = [f"{row * COLUMNS + 1} to {(row + 1) * COLUMNS}" for row in range(len(rows))]
    save_png(sheet(rows, starts, [""] * COLUMNS), out / "check.png")
    atomic_write_text(out / "answers.txt", "".join(f"{i + 1} {prompt}\n" for i, prompt in enumerate(wanted)))
    return out / "check.png"

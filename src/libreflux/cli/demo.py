"""`libreflux demo`: teach the emoji family a look that it has never seen, and show before and after."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.errors import RunError

if TYPE_CHECKING:
    from PIL import Image

MODEL = "emoji-base"
PICTURES = 400
STEPS = 500
GUIDANCE = (1.0, 3.0, 6.0)
PROMPTS = (
    "a pencil drawing of a rocket",
    "a pencil drawing of an owl",
    "a pencil drawing of a house",
    "a pencil drawing of a hamburger",
    "a pencil drawing of a guitar",
    "a pencil drawing of a penguin",
)
SEED = 1

RECIPE = """\
# What `libreflux demo` trained; change anything and run it again under another `out`.
schema: 1
model: {model}
data:
  - path: {data}
    captions: {{short: 0.7, tags: 0.3, long: 0}}   # one long caption would widen its whole batch
    caption_dropout: 0.1               # the empty prompt is learnt too: guidance needs it
resolution: 128
adapter:
  init: perturbed
  targets:
    - {{layers: "**", factor: 2}}        # every linear layer, a quarter of its parameters
sigmas: {{law: beta, alpha: 2.0, beta: 2.0, stratified: true}}
batch: 16
steps: {steps}
optimizer: {{kind: adamw, learning_rate: 1e-3, weight_decay: 0.0, warmup: 20, schedule: cosine}}
samples: {{every: 0}}
save: {{every: 100, keep: 2}}
seed: 0
out: {out}
"""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps; fewer are faster and show less.")] = STEPS,
    pictures: Annotated[int, typer.Option(min=16, help="Pictures to learn from.")] = PICTURES,
) -> None:
    """The whole story on the emoji family: pictures, training, merging, and before and after under guidance.

    Interrupted, the same command goes on where it was.
    """
    from libreflux.cli import demo_page
    from libreflux.recipe import load_recipe

    if out.exists() and not out.is_dir():
        raise RunError("is a file", where=out, mend="name a folder with --out")
    data, run, model = out / "pictures", out / "run", out / "model"
    times: dict[str, float] = {}

    _say(f"1/5 {pictures} pictures of a look that {MODEL} has never seen, in {data}")
    with _timed(times, "composing the pictures"):
        _write_pictures(data, pictures)

    out.mkdir(parents=True, exist_ok=True)
    recipe_file = out / "recipe.yaml"
    recipe_file.write_text(RECIPE.format(model=MODEL, data=data, steps=steps, out=run), encoding="utf-8")
    recipe = load_recipe(recipe_file)

    _say("2/5 drawing with the model as it is")
    with _timed(times, "drawing before"):
        before = _draw(MODEL, "before")

    _say(f"3/5 preparing and training a LoKr adapter, {steps} steps")
    with _timed(times, "preparing and training"):
        adapter = _train(recipe)

    _say(f"4/5 merging it into a new model, {model}")
    with _timed(times, "merging"):
        _merge(adapter, model)

    _say("5/5 drawing with the new model")
    with _timed(times, "drawing after"):
        after = _draw(str(model), "after")

    commands = [
        f"libreflux demo-data {data} --count {pictures} --seed {SEED} --look pencil --pairs 0",
        f"libreflux prepare {data} --out {run / 'cache'}",
        f"libreflux train {recipe_file}",
        f"libreflux merge {MODEL} {adapter} --out {model}",
        f'libreflux generate "{PROMPTS[0]}" --model {model} --guidance 3 --seed {SEED} --out {out / "one.png"}',
    ]
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    page = demo_page.write(
        out, before=before, after=after, prompts=PROMPTS, guidance=GUIDANCE, examples=sorted(data.glob("*.png"))[:8],
        losses=losses, times=times, commands=commands, recipe=recipe_file.read_text("utf-8"),
    )  # fmt: skip
    _say(f"done in {sum(times.values()) / 60:.1f} minutes: open {page}")


def _say(line: str) -> None:
    typer.echo(line, err=True)


class _timed:
    def __init__(self, times: dict[str, float], what: str) -> None:
        self.times, self.what = times, what

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.times[self.what] = time.perf_counter() - self.began


def _write_pictures(data: Path, count: int) -> None:
    if data.is_dir() and len(list(data.glob("*.png"))) == count:
        return
    if data.exists():
        raise RunError("holds other pictures", where=data, mend="remove it, or name another folder with --out")
    from libreflux.cli.demo_data import demo_data

    data.parent.mkdir(parents=True, exist_ok=True)
    demo_data(data, count, SEED, "pencil", 0.0)


def _train(recipe: object) -> Path:
    import sys

    from libreflux.cli.training import ShowTraining
    from libreflux.recipe import Recipe
    from libreflux.train.interrupt import Interrupted
    from libreflux.train.loop import fit

    assert isinstance(recipe, Recipe)
    with ShowTraining(recipe) as shown:
        try:
            return fit(recipe, shown)
        except Interrupted as stopped:
            typer.echo(str(stopped), err=True)
            sys.exit(stopped.exit_code)


def _merge(adapter: Path, model: Path) -> None:
    import shutil

    from libreflux.cli.merge import merge

    shutil.rmtree(model, ignore_errors=True)  # of an earlier demo in this folder; it is made again in a second
    merge(MODEL, [str(adapter)], model)


def _draw(model: str, what: str) -> list[list[Image.Image]]:
    """Rows of prompts, columns of `GUIDANCE`."""
    import torch

    from libreflux.cli.progress import progress
    from libreflux.model.family import open_model
    from libreflux.sample.pipeline import LibreFluxPipeline

    opened = open_model(model, device="cuda" if torch.cuda.is_available() else "cpu")
    assert opened.vae is not None
    opened.vae.float()
    pipe = LibreFluxPipeline.from_model(opened)
    pipe.set_progress_bar_config(disable=True)
    steps, columns = opened.facts.steps, []
    with progress(f"drawing {what}", "step") as report:
        for number, guidance in enumerate(GUIDANCE):

            def done(step: object, number: int = number) -> None:
                index: int = step.index  # type: ignore[attr-defined]
                report(number * steps + index + 1, len(GUIDANCE) * steps)

            drawn = pipe(list(PROMPTS), guidance_scale=guidance, seeds=[SEED] * len(PROMPTS), callback_on_step=done)
            columns.append(drawn.images)
    return [list(row) for row in zip(*columns, strict=True)]

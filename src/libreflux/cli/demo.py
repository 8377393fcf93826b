"""`libreflux demo`: teach the emoji family a look that it has never seen, and show before and after."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.errors import LibrefluxError, RunError

if TYPE_CHECKING:
    from PIL import Image

    from libreflux.flow.solve import Step
    from libreflux.recipe import Recipe

MODEL = "emoji-base"
PICTURES = 400
STEPS = 500
GUIDANCE = (1.0, 3.0, 6.0)
PROMPTS = (
    "a rocket on white",
    "an owl on white",
    "a house on white",
    "a hamburger on white",
    "a guitar on white",
    "a penguin on white",
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
optimizer: {{kind: adamw, learning_rate: 1e-3, weight_decay: 0.0, warmup: {warmup}, schedule: cosine}}
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
    from libreflux.files import atomic_write_text
    from libreflux.recipe import read_recipe
    from libreflux.recipe_yaml import scalar
    from libreflux.train.checkpoint import check_recipe

    if out.exists() and not out.is_dir():
        raise RunError("is a file", where=out, mend="name a folder with --out")
    data, run, model, recipe_file = out / "pictures", out / "run", out / "model", out / "recipe.yaml"
    if model.exists() and not _made_here(model, run / "adapter.safetensors"):
        raise RunError("is not a demo's model", where=model, mend="name another folder with --out")
    if recipe_file.exists() and not recipe_file.read_text("utf-8").startswith(RECIPE.partition("\n")[0]):
        raise RunError("is not a demo's recipe", where=recipe_file, mend="name another folder with --out")
    places = {"data": scalar(str(data)), "out": scalar(str(run))}
    text = RECIPE.format(model=MODEL, steps=steps, warmup=min(20, steps // 10), **places)
    recipe = read_recipe(text, str(recipe_file))
    check_recipe(run, recipe)
    atomic_write_text(recipe_file, text)
    times: dict[str, float] = {}

    _say(f"1/5 {pictures} pictures of a look that {MODEL} has never seen, in {data}")
    with _timed(times, "composing the pictures"):
        _write_pictures(data, pictures)

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

    steps_told = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [told["loss"] for told in steps_told if told["loss"] is not None]  # null: a step that was skipped
    page = demo_page.write(
        out, before=before, after=after, prompts=PROMPTS, guidance=GUIDANCE, examples=sorted(data.glob("*.png"))[:8],
        losses=losses, times=times, commands=_by_hand(out, pictures), recipe=text,
    )  # fmt: skip
    _say(f"done in {sum(times.values()) / 60:.1f} minutes: open {page}")


def _by_hand(out: Path, pictures: int) -> list[str]:
    """Commands that do the demo again, into a folder of their own."""
    from libreflux.recipe_yaml import scalar

    hand = out / "by-hand"
    data, run, model = hand / "pictures", hand / "run", hand / "model"
    words: list[list[object]] = [
        ["demo-data", data, "--count", pictures, "--seed", SEED, "--look", "pencil", "--pairs", 0],
        ["train", out / "recipe.yaml", f"data.0.path={scalar(str(data))}", f"out={scalar(str(run))}"],
        ["merge", MODEL, run / "adapter.safetensors", "--out", model],
        ["generate", PROMPTS[0], "--model", model, "--guidance", 3, "--seed", SEED, "--out", hand / "one.png"],
    ]
    return [shlex.join(["libreflux", *map(str, line)]) for line in words]


def _made_here(model: Path, adapter: Path) -> bool:
    """Whether a folder holds the model that was merged from this adapter."""
    from libreflux.files import sha256_file
    from libreflux.model.facts import read_facts

    try:
        rows = read_facts(model).lineage.get("adapters", [])
        return adapter.is_file() and [row["sha256"] for row in rows] == [sha256_file(adapter)]
    except (LibrefluxError, KeyError, TypeError):
        return False


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


def _train(recipe: Recipe) -> Path:
    import sys

    from libreflux.cli.training import ShowTraining
    from libreflux.train.interrupt import Interrupted
    from libreflux.train.loop import fit

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
    from libreflux.cli.drawing import open_for_drawing
    from libreflux.cli.progress import progress

    opened = open_for_drawing(model)
    steps, columns = opened.facts.steps, []
    with progress(f"drawing {what}", "step") as report:
        for number, guidance in enumerate(GUIDANCE):

            def on_step(step: Step, number: int = number) -> None:
                report(number * steps + step.index + 1, len(GUIDANCE) * steps)

            drawn = opened.pipe(
                list(PROMPTS), guidance_scale=guidance, seeds=[SEED] * len(PROMPTS), callback_on_step=on_step
            )
            columns.append(drawn.images)
    return [list(row) for row in zip(*columns, strict=True)]

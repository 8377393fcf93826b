"""`libreflux demo`: set the distilled emoji model free, and measure and show what that did."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libreflux import plainjson
from libreflux.errors import RunError
from libreflux.printing import counted, say

if TYPE_CHECKING:
    from libreflux.recipe import Recipe

MODEL = "emoji-schnell"
PICTURES = 1500
STEPS = 200
SEED = 1
MEASURED: dict[str, Any] = {"pictures": 64, "prompts": 10, "guidance": (1.0, 2.0, 4.0, 6.0), "steps": (4, 28)}
"""What is measured, `probe --quick` in the rest."""

RECIPE = """\
# What `libreflux demo` trained; change anything and run it again under another `out`.
schema: 1
model: {model}
base: int8
data:
  - path: {data}
    captions: {{short: 0.7, long: 0.3}}
    caption_dropout: 0.1               # the empty prompt is learnt too: guidance needs it
resolution: 128
adapter:
  init: perturbed
  targets:                             # attention and feed-forward, a quarter of their parameters
    - {{layers: "transformer_blocks.*.attn.**", factor: 2}}
    - {{layers: "transformer_blocks.*.ff*.**", factor: 2}}
    - {{layers: "single_transformer_blocks.*.attn.**", factor: 2}}
    - {{layers: "single_transformer_blocks.*.proj_*", factor: 2}}
sigmas: {{law: beta, alpha: 2.0, beta: 2.0, stratified: true}}
batch: 32
steps: {steps}
optimizer: {{kind: adamw, learning_rate: 1e-3, weight_decay: 0.0, warmup: {warmup}, schedule: cosine}}
samples: {{every: 0}}
save: {{every: 100, keep: 2}}
seed: 0
out: {out}
"""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps; fewer are faster and free less.")] = STEPS,
    pictures: Annotated[int, typer.Option(min=32, help="Pictures to learn from.")] = PICTURES,
) -> None:
    """The whole story on the emoji family: a distilled model is set free, measured before and after, and shown.

    Interrupted, the same command goes on where it was.
    """
    from libreflux.cli import demo_page
    from libreflux.cli.progress import progress
    from libreflux.files import atomic_write_text
    from libreflux.places import folder_place
    from libreflux.recipe import read_recipe
    from libreflux.recipe.yaml_text import scalar
    from libreflux.training.checkpoint import check_recipe
    from libreflux.workflows.probe import probe

    folder_place(out, "run", "probe")
    data, run, measured, recipe_file = out / "pictures", out / "run", out / "probe", out / "recipe.yaml"
    if recipe_file.exists() and not recipe_file.read_text("utf-8", "replace").startswith(RECIPE.partition("\n")[0]):
        raise RunError("is not a demo's recipe", where=recipe_file, hint="name another folder with --out")
    places = {"data": scalar(str(data)), "out": scalar(str(run))}
    text = RECIPE.format(model=MODEL, steps=steps, warmup=min(20, steps // 10), **places)
    recipe = read_recipe(text, str(recipe_file))
    check_recipe(run, recipe)
    atomic_write_text(recipe_file, text)
    times: dict[str, float] = {}

    _say(f"1/3 {pictures} captioned pictures in {data}")
    with _timed(times, "composing the pictures"):
        _write_pictures(data, pictures)

    _say(f"2/3 setting {MODEL} free: a LoKr adapter over its int8 weights, {counted(steps, 'step')}")
    with _timed(times, "preparing and training"):
        adapter = _train(recipe)

    _say("3/3 measuring it: before, after, and the model that was distilled")
    with _timed(times, "measuring and drawing"):
        found = probe(MODEL, adapters=[str(adapter)], against=MODEL, quick=True, out=measured, progress=progress,
                      **MEASURED)  # fmt: skip

    steps_told = [plainjson.parse(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    page = demo_page.write(
        out, found, examples=sorted(data.glob("[!.]*.png"))[:8], pictures=pictures, times=times, recipe=text,
        losses=[told["loss"] for told in steps_told if told["loss"] is not None],  # null: a step that was skipped
        commands=_by_hand(out, pictures),
    )  # fmt: skip
    _say(f"done in {sum(times.values()) / 60:.1f} minutes: open {page}")


def _by_hand(out: Path, pictures: int) -> list[str]:
    """Commands that do the demo again, into a folder of their own."""
    from libreflux.recipe.yaml_text import scalar

    hand = out / "by-hand"
    data, run = hand / "pictures", hand / "run"
    scales, counts = (",".join(f"{value:g}" for value in MEASURED[key]) for key in ("guidance", "steps"))
    words: list[list[object]] = [
        ["demo-data", data, "--count", pictures, "--seed", SEED],
        ["train", out / "recipe.yaml", f"data.0.path={scalar(str(data))}", f"out={scalar(str(run))}"],
        ["probe", MODEL, "--adapter", run, "--against", MODEL, "--quick", "--pictures", MEASURED["pictures"],
         "--prompts", MEASURED["prompts"], "--guidance", scales, "--steps", counts, "--out", hand / "probe"],
        ["generate", "a rocket on white", "--model", MODEL, "--adapter", run, "--guidance", 4, "--seed", SEED,
         "--out", hand / "one.png"],
        ["merge", MODEL, run, "--out", hand / "model"],
    ]  # fmt: skip
    return [shlex.join(["libreflux", *map(str, line)]) for line in words]


def _say(line: str) -> None:
    say(line, err=True)


class _timed:
    def __init__(self, times: dict[str, float], what: str) -> None:
        self.times, self.what = times, what

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.times[self.what] = time.perf_counter() - self.began


def _write_pictures(data: Path, count: int) -> None:
    if data.is_dir() and len(list(data.glob("[!.]*.png"))) == count:
        return
    if data.exists():
        raise RunError("holds other pictures", where=data, hint="remove it, or name another folder with --out")
    from libreflux.cli.demo_data import demo_data

    data.parent.mkdir(parents=True, exist_ok=True)
    demo_data(data, count, SEED, "plain", 0.2)


def _train(recipe: Recipe) -> Path:
    import sys

    from libreflux.cli.training import ShowTraining
    from libreflux.training.interrupt import Interrupted
    from libreflux.training.loop import fit

    with ShowTraining(recipe) as shown:
        try:
            return fit(recipe, shown)
        except Interrupted as stopped:
            say(stopped, err=True)
            sys.exit(stopped.exit_code)

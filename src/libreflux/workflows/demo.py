"""The whole story on the emoji family: a distilled model is set free, measured before and after, and shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from libreflux import plainjson
from libreflux.errors import OptionHint, RunError
from libreflux.files import atomic_write_text
from libreflux.places import folder_place
from libreflux.printing import counted, quoted_command
from libreflux.recipe import read_recipe
from libreflux.recipe.yaml_text import scalar
from libreflux.workflows.demo_data import DemoDataOptions, DemoDataResult, demo_data_with
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import check_whole
from libreflux.workflows.progress import Progress, silent
from libreflux.workflows.train import TrainOptions, TrainResult, train_with
from libreflux.workflows.train_events import TrainEvents

if TYPE_CHECKING:
    from libreflux.probing.freedom import FreedomRow
    from libreflux.probing.results import Result

MODEL = "emoji-schnell"
PICTURES = 1500
STEPS = 200
SEED = 1

RECIPE = """\
# What `libreflux demo` trained; change anything and run it again under another `out`.
schema: 1
model: {model}
base: {base}
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


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the demo measures, as `probe --quick` in the rest; see `ProbeOptions`."""

    pictures: int = 64
    prompts: int = 10
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0)
    steps: tuple[int, ...] = (4, 28)


MEASURED = Measured()


@dataclass(frozen=True)
class DemoOptions:
    """How long the demo learns, and who listens.

    Attributes:
        out: folder for everything that the demo writes.
        steps: training steps, at least 1; fewer are faster and free less.
        pictures: how many to learn from, at least 32.
        events: hears of the training; None: nobody does.
        on_part: called with a line when a part of the demo begins; None: with nothing.
        on_pictures: called when the pictures are written, which an earlier demo may have done.
        progress: shows how far composing and measuring are.
    """

    out: Path | str = Path("out/demo")
    steps: int = STEPS
    pictures: int = PICTURES
    events: TrainEvents | None = field(default=None, repr=False, compare=False)
    on_part: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    on_pictures: Callable[[DemoDataResult], None] | None = field(default=None, repr=False, compare=False)
    progress: Progress = field(default=silent, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What was found.

    Attributes:
        training: of the adapter. Where a signal `stopped` it nothing was measured: the same call goes on.
        page: what was found, for a browser; None where the training was stopped.
        freedom: how much of the distance between the distilled and the original model was closed, by measure.
        seconds: that each part took.
    """

    training: TrainResult
    page: Path | None
    freedom: Sequence[FreedomRow]
    seconds: dict[str, float]


def demo_with(options: DemoOptions) -> DemoResult:
    """Set the distilled emoji model free, measure it before and after, and show that on a page.

    Interrupted, the same call goes on where it was.

    Raises:
        RunError: the folder holds something else, or a demo with other steps or pictures.
        LibrefluxError: see `train_with` and `probe_with`.

    Example::

        import libreflux

        print(libreflux.demo("out/demo", steps=2, pictures=32).page)  # some minutes: measuring takes most of them
    """
    check_whole("steps", options.steps, 1)
    check_whole("pictures", options.pictures, 32)
    from libreflux.training.checkpoint import check_recipe

    out, tell = Path(options.out), options.on_part or (lambda line: None)
    folder_place(out, "run", "probe")
    data, run, recipe_file = out / "pictures", out / "run", out / "recipe.yaml"
    begun = recipe_file.read_text("utf-8", "replace") if recipe_file.exists() else None
    if begun is not None and not begun.startswith(RECIPE.partition("\n")[0]):
        raise RunError("is not a demo's recipe", where=recipe_file, hint=OptionHint("name another folder with `out`"))
    base = _base() if begun is None else read_recipe(begun, str(recipe_file)).base  # a begun demo goes on as it was
    dtype = "fp32" if base == "fp32" else "stored"
    places = {"data": scalar(str(data)), "out": scalar(str(run))}
    text = RECIPE.format(model=MODEL, base=base, steps=options.steps, warmup=min(20, options.steps // 10), **places)
    recipe = read_recipe(text, str(recipe_file))
    check_recipe(run, recipe)
    atomic_write_text(recipe_file, text)
    seconds: dict[str, float] = {}

    tell(f"1/3 {options.pictures} captioned pictures in {data}")
    with _timed(seconds, "composing the pictures"):
        _write_pictures(data, options)

    tell(f"2/3 setting {MODEL} free: a LoKr adapter over its {base} weights, {counted(options.steps, 'step')}")
    with _timed(seconds, "preparing and training"):
        training = train_with(TrainOptions(recipe, events=options.events))
    if training.adapter is None:
        return DemoResult(training=training, page=None, freedom=(), seconds=seconds)

    tell("3/3 measuring it: before, after, and the model that was distilled")
    with _timed(seconds, "measuring and drawing"):
        results, freedom = _measure(training.adapter, out / "probe", dtype, options.progress)
    page = _page(out, results, freedom, seconds, by_hand(out, options.pictures, dtype), options.pictures, text)
    return DemoResult(training=training, page=page, freedom=freedom, seconds=seconds)


def _base() -> Literal["int8", "fp32"]:
    """int8, as large models are trained; fp32 on a CPU that has no instructions for bf16, which int8 goes with."""
    from libreflux.model.device import multiplies_bf16, pick_device

    return "int8" if multiplies_bf16(pick_device()) else "fp32"


def _measure(adapter: Path, out: Path, dtype: str, progress: Progress) -> tuple[list[Result], list[FreedomRow]]:
    """Before, after, and what is aimed at; and how far it has come."""
    from libreflux.workflows.probe import probe

    found = probe(
        MODEL,
        adapters=[str(adapter)],
        against=MODEL,
        controls=False,
        quick=True,
        dtype=dtype,
        out=out,
        progress=progress,
        pictures=MEASURED.pictures,
        prompts=MEASURED.prompts,
        guidance=MEASURED.guidance,
        steps=MEASURED.steps,
    )
    return found.in_order, list(found.freedom or ())


def _page(
    out: Path,
    results: Sequence[Result],
    freedom: Sequence[FreedomRow],
    seconds: dict[str, float],
    commands: list[str],
    pictures: int,
    recipe: str,
) -> Path:
    from libreflux.workflows.demo_page import DemoFound, write

    steps = [plainjson.parse(line) for line in (out / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    found = DemoFound(
        results=results,
        freedom=freedom,
        examples=sorted((out / "pictures").glob("[!.]*.png"))[:8],
        pictures=pictures,
        seconds=seconds,
        recipe=recipe,
        losses=[told["loss"] for told in steps if told["loss"] is not None],  # null: a step that was skipped
        commands=commands,
    )
    return write(out, found)


def by_hand(out: Path, pictures: int, dtype: str) -> list[str]:
    """Commands that do the demo again, into a folder of their own, measured with weights of this dtype."""
    hand = out / "by-hand"
    data, run = hand / "pictures", hand / "run"
    scales, counts = (",".join(f"{value:g}" for value in values) for values in (MEASURED.guidance, MEASURED.steps))
    measured: list[object] = ["--pictures", MEASURED.pictures, "--prompts", MEASURED.prompts]
    measured += ["--guidance", scales, "--steps", counts, *([] if dtype == "stored" else ["--dtype", dtype])]
    drawn = ["--guidance", 4, "--seed", SEED, "--out", hand / "one.png"]
    words: list[list[object]] = [
        ["demo-data", data, "--count", pictures, "--seed", SEED],
        ["train", out / "recipe.yaml", f"data.0.path={scalar(str(data))}", f"out={scalar(str(run))}"],
        [
            "probe",
            MODEL,
            "--adapter",
            run,
            "--against",
            MODEL,
            "--no-controls",
            "--quick",
            *measured,
            "--out",
            hand / "probe",
        ],
        ["generate", "a rocket on white", "--model", MODEL, "--adapter", run, *drawn],
        ["merge", MODEL, run, "--out", hand / "model"],
    ]
    return [quoted_command(["libreflux", *line]) for line in words]


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = time.perf_counter() - began


def _write_pictures(data: Path, options: DemoOptions) -> None:
    if data.is_dir() and len(list(data.glob("[!.]*.png"))) == options.pictures:
        return
    if data.exists():
        hint = OptionHint("remove it, or name another folder with `out`")
        raise RunError("holds other pictures", where=data, hint=hint)
    data.parent.mkdir(parents=True, exist_ok=True)
    written = demo_data_with(
        DemoDataOptions(data, count=options.pictures, seed=SEED, pairs=0.2, progress=options.progress)
    )
    if options.on_pictures is not None:
        options.on_pictures(written)


demo = by_keywords(DemoOptions, demo_with)

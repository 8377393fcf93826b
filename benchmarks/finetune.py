"""Is a freed model easier to fine-tune? The same small sets, the same recipe, from each of several models.

    python -m benchmarks.finetune --work DIR                       # emoji-schnell, emoji-libre and emoji-base
    python -m benchmarks.finetune --work DIR --model base=DIR/m/base --model schnell=DIR/m/schnell \\
        --set look=photos --rest look=others
    python -m benchmarks.finetune --work DIR --quick               # every arm, a few steps each: a few minutes

Two sets: a look that no model has seen, and a subject that none has seen. From each model the same recipe
(docs/style.yaml, or --recipe) trains an adapter with each of three seeds. Over the steps it is measured: the loss of
held-out pictures of the set; by guidance, the share of drawn pictures that a judge takes for the set's; and their
sharpness. The judge tells pictures of the set from --rest pictures by features that no model has made, is fitted on one
half of the real ones, and what it makes of the other half (its confusion) is stated. Intervals are over pictures
and, where there are several, seeds.
Trainings and pictures are kept, and the same command goes on: first one seed of everything, then the others.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from benchmarks.family import sharpness
from benchmarks.features import edges, random_net, read_pictures, thumbnail
from benchmarks.finetune_page import Row, write
from PIL import Image
from torch import Tensor

import libreflux
from libreflux import plainjson, seeding
from libreflux.emoji import compose
from libreflux.files import atomic_save_safetensors
from libreflux.printing import say
from libreflux.probing.metrics.bootstrap import REPLICATES
from libreflux.probing.metrics.measures import CONFIDENCE, resampled
from libreflux.probing.metrics.student import quantile
from libreflux.probing.metrics.wilson import wilson
from libreflux.probing.no_training import halves
from libreflux.probing.over_seeds import spread_over_seeds
from libreflux.recipe import load_recipe
from libreflux.training.checkpoint import ADAPTER, step_folder

MODELS = {"schnell": "emoji-schnell", "libre": "emoji-libre", "base": "emoji-base"}
RIDGE = 1.0
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
ROOT = Path(__file__).resolve().parent.parent
HALVES = (11, 40)
"""What no model has a picture of: two subjects' halves, one above the other, called by both names."""


@dataclass(frozen=True)
class Settings:
    """How finely it is measured."""

    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    seeds: tuple[int, ...]
    prompts: int
    draw_steps: int
    side: int
    pictures: int


FULL = Settings((0, 25, 50, 100, 200, 400), (1.0, 3.0, 6.0), (0, 1, 2), 24, 28, 128, 64)
QUICK = Settings((0, 2), (1.0, 3.0), (0, 1), 3, 2, 64, 12)


class Judge:
    """Tells pictures of a set from others, by least squares on features that nothing has trained.

    Attributes:
        right: (of the set, of the rest) how many of the other half's real pictures it takes for what they are.
        asked: how many those halves have.
    """

    def __init__(self, own: Tensor, rest: Tensor) -> None:
        """Both [N, 3, H, W]; every second of each is fitted, the others say how good it is."""
        self._net = random_net()
        sides = [self._features(each) for each in (own, rest)]
        fitted = np.concatenate([side[::2] for side in sides])
        wanted = np.concatenate([np.full(len(side[::2]), sign) for side, sign in zip(sides, (1.0, -1.0), strict=True)])
        self._mean, self._std = fitted.mean(0), fitted.std(0) + 1e-3
        x = (fitted - self._mean) / self._std
        kernel = x @ x.T + RIDGE * x.shape[1] ** 0.5 * np.eye(len(x))
        self._weights = x.T @ np.linalg.solve(kernel, wanted)
        told = [self._score(side[1::2]) for side in sides]
        self.right = (int((told[0] > 0).sum()), int((told[1] <= 0).sum()))
        self.asked = (len(told[0]), len(told[1]))

    def __call__(self, pixels: Tensor) -> np.ndarray:
        """[B]: 1 for what it takes for the set's, else 0."""
        found: np.ndarray = (self._score(self._features(pixels)) > 0).astype(np.float64)
        return found

    def _score(self, features: np.ndarray) -> np.ndarray:
        found: np.ndarray = (features - self._mean) / self._std @ self._weights
        return found

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> np.ndarray:
        small = torch.nn.functional.interpolate(pixels, (64, 64), mode="area")
        return torch.cat([thumbnail(small), edges(small), self._net(small)], dim=1).double().numpy()

    @property
    def told(self) -> str:
        """Its confusion, in words."""
        parts = []
        for what, right, asked in zip(("of the set", "of the rest"), self.right, self.asked, strict=True):
            low, high = wilson(right, asked)
            parts.append(f"{right} of {asked} {what} [{low:.2f}, {high:.2f}]")
        return f"The judge is right on other real pictures: {', '.join(parts)}."


def unseen_subject(out: Path, count: int) -> None:
    """Writes pictures of a subject that there is not: the upper half of one and the lower half of another."""
    first, second = (compose.subjects()[number] for number in HALVES)
    rows = []
    for index in range(count):
        colour = list(compose.COLOURS)[seeding.rng(0, "zorbo", index).integers(len(compose.COLOURS))]
        size = "large" if index % 2 else "medium"
        parts = [np.asarray(compose.render(compose.Scene(one, colour, size))) for one in (first, second)]
        half = len(parts[0]) // 2
        Image.fromarray(np.concatenate([parts[0][:half], parts[1][half:]])).save(out / f"{index:04d}.png")
        rows.append(f"a {first.name} {second.name} on {colour}")
    for index, text in enumerate(rows):
        (out / f"{index:04d}.txt").write_text(text, encoding="utf-8")


def own_sets(work: Path, count: int) -> dict[str, tuple[Path, Path]]:
    """The emoji family's sets, each with what it is unlike; whole ones are kept."""
    found = {}
    for name in ("look", "subject", "rest"):
        folder = work / "sets" / name
        if not folder.is_dir():
            staging = folder.with_name(f".{name}")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            if name == "subject":
                unseen_subject(staging, count)
            else:
                look = "pencil" if name == "look" else "plain"
                compose.write_folder(staging / "in", count, 1, pairs=0.0, look=look)
                _keep_short(staging)
            staging.rename(folder)
        found[name] = folder
    return {name: (found[name], found["rest"]) for name in ("look", "subject")}


def _keep_short(staging: Path) -> None:
    """Pictures with their first captions alone: one long caption would widen its whole batch."""
    for picture in sorted((staging / "in").glob("*.png")):
        text = picture.with_suffix(".txt").read_text("utf-8").splitlines()[0]
        (staging / picture.name).with_suffix(".txt").write_text(text, encoding="utf-8")
        picture.rename(staging / picture.name)
    shutil.rmtree(staging / "in")


def train(args: argparse.Namespace, name: str, model: str, pictures: Path, seed: int, told: Settings) -> Path:
    """The run of one arm, finished; it is resumed where it was left."""
    run = args.work / "runs" / f"{name}-{model}-{seed}{args.suffix}"
    tree = yaml.safe_load(args.recipe.read_text("utf-8"))
    every = int(np.gcd.reduce([step for step in told.steps if step]))
    tree |= {
        "model": args.models[model],
        "data": [
            {**{key: value for key, value in tree["data"][0].items() if key != "captions"}, "path": str(pictures)}
        ],
        "resolution": told.side,
        "steps": max(told.steps),
        "seed": seed,
        "samples": {"every": 0},
        "save": {"every": every, "keep": 1, "keep_every": every},
        "held_out": {"share": 0.25, "every": every, "pictures": told.pictures},
        "cache": str(args.work / "cache"),
        "out": str(run),
    }
    if args.quick:
        tree |= {"batch": 2, "optimizer": tree["optimizer"] | {"warmup": 0}}
    done = libreflux.train(tree)
    if done.stopped is not None:
        raise done.stopped
    return run


def losses(run: Path, told: Settings) -> dict[int, tuple[float, float, int]]:
    """Step to the held-out loss, mean over noise levels, its standard error over pictures, and how many they are."""
    found = {}
    for line in (run / "held_out.jsonl").read_text("utf-8").splitlines():
        row = plainjson.parse(line)
        if row["step"] in told.steps:
            error = np.mean(np.subtract(row["loss_high"], row["loss_low"])) / 3.92
            found[int(row["step"])] = (float(np.mean(row["loss"])), float(error), int(row["pictures"]))
    return found


def drawn(
    args: argparse.Namespace, run: Path, model: str, step: int, scale: float, prompts: Sequence[str], told: Settings
) -> Tensor:
    """[N, 3, side, side] in [-1, 1] of one checkpoint, a picture of each prompt; kept in a file."""
    from safetensors.torch import load_file

    mark = seeding.key(0, "finetune", *prompts, told.draw_steps, told.side)
    file = run / "drawn" / f"{step}-{scale:g}-{mark:x}.safetensors"
    if not file.is_file():
        adapters = [] if step == 0 else [str(step_folder(run, step) / ADAPTER)]
        asked: dict[str, Any] = {
            "model": args.models[model],
            "adapters": adapters,
            "guidance": scale,
            "steps": told.draw_steps,
        }
        found = libreflux.generate(list(prompts), **asked, seed=1, width=told.side, height=told.side)
        pictures = np.stack([np.asarray(one.image) for one in found.pictures])
        atomic_save_safetensors({"pixels": torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()}, file)
    return load_file(file)["pixels"].float().div(127.5).sub(1)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of [K, N] values, of K seeds and N prompts that they share, and its 95 % interval over both."""
    counts = values.shape[1] * float(values.mean()), values.shape[1]
    is_share = np.isin(values, (0, 1)).all()
    if len(values) == 1 and is_share:
        return float(values.mean()), *wilson(*counts)
    weights = np.vstack(
        [np.full((1, values.shape[1]), 1 / values.shape[1]), resampled(values.shape[1], replicates=REPLICATES)]
    )
    each = values @ weights.T
    moved = each[:, 1:].mean(axis=0) + (spread_over_seeds(each) if len(each) > 1 else 0.0)
    low, high = np.quantile(moved, TAILS)
    if is_share:  # of prompts that all seeds got right a bootstrap says that there are no others
        least, most = wilson(*counts)
        low, high = max(0.0, min(low, least)), min(1.0, max(high, most))
    return float(each[:, 0].mean()), float(low), float(high)


def loss_interval(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float, float]:
    """Mean of K seeds' losses and its 95 % interval: `errors` are of the pictures, which all seeds share."""
    mean, reach = float(np.mean(values)), 1.96 * float(np.mean(np.square(errors))) ** 0.5
    if (count := len(values)) > 1:
        of_seeds = quantile(1 - CONFIDENCE, count - 1) * float(np.std(values, ddof=1)) / count**0.5
        reach = math.hypot(reach, of_seeds)
    return mean, mean - reach, mean + reach


def measured(
    args: argparse.Namespace,
    name: str,
    model: str,
    seeds: Sequence[int],
    told: Settings,
    judge: Judge,
    prompts: Sequence[str],
    pictures: Path,
) -> Iterator[Row]:
    """Every row of one set and model."""
    runs = [train(args, name, model, pictures, seed, told) for seed in seeds]
    known = [losses(run, told) for run in runs]
    for step in told.steps:
        found = loss_interval([one[step][0] for one in known], [one[step][1] for one in known])
        yield Row(name, model, len(seeds), step, "loss", None, *found, known[0][step][2])
        for scale in told.guidance:
            pixels = [drawn(args, run, model, step, scale, prompts, told) for run in runs]
            args.shown[name, model, step, scale] = pixels[0][0]
            for measure, of in (("likeness", judge), ("sharpness", sharpness)):
                found = interval(np.stack([of(each) for each in pixels]))
                yield Row(name, model, len(seeds), step, measure, scale, *found, len(prompts))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL", help="default: the emoji family")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=DIR", help="captioned pictures to train on")
    parser.add_argument("--rest", action="append", default=[], metavar="NAME=DIR", help="what the set is unlike")
    parser.add_argument("--recipe", type=Path, default=ROOT / "docs" / "style.yaml")
    parser.add_argument("--seeds", help="of the training, with commas; default: 0,1,2")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    args.shown = {}
    told, args.suffix = (QUICK, "-quick") if args.quick else (FULL, "")
    seeds = told.seeds if args.seeds is None else tuple(int(one) for one in args.seeds.split(","))
    args.models = dict(one.split("=", 1) for one in args.model) or MODELS
    load_recipe(args.recipe)
    rest = {name: Path(folder) for name, folder in (one.split("=", 1) for one in args.rest)}
    sets = {name: (Path(folder), rest[name]) for name, folder in (one.split("=", 1) for one in args.set)}
    sets = sets or own_sets(args.work, 16 if args.quick else 64)
    for some in dict.fromkeys((seeds[:1], seeds)):  # the thin table first
        rows, confusions = list[Row](), dict[str, str]()
        for name, (pictures, others) in sets.items():
            names, captions, own = read_pictures(pictures, 10**6, told.side)
            judge = Judge(own, read_pictures(others, len(own), told.side)[2])
            confusions[name] = judge.told
            chosen = sorted({captions[row] for row in halves(names, 0)[1]})[: told.prompts]
            for model in args.models:
                rows += measured(args, name, model, some, told, judge, chosen, pictures)
                write(args.work / f"finetune{args.suffix}", rows, confusions, args.shown)
                say(f"{name}, {model}, {len(some)} seeds: {args.work / f'finetune{args.suffix}.csv'}")


if __name__ == "__main__":
    main()

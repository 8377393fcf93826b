"""Training at FLUX.1's size in main memory: what `full_size.py --train` does with the folder that it has built.

Pictures and captions are encoded by one process; another one, which has the cache, trains LoKr `libreflux-600m` on the
int8 model, mapped from disk: three optimizer steps at 256 px with a caption of 64 tokens, a checkpoint, and a picture
of two guided steps. Its VmHWM, mapped pages included, stands beside what `train --dry-run` estimates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import FluxTransformer2DModel
from PIL import Image

from libreflux.data.prepare import prepare_recipe
from libreflux.model.load import load_t5_tokenizer
from libreflux.recipe import Recipe
from libreflux.training.callbacks import Started, StepInfo
from libreflux.training.loop import fit
from libreflux.workflows.dry_run import dry_run
from libreflux.workflows.run_record import RunRecorder

TOKENS, SIDE = 64, 256


def recipe_tree(folder: Path, *, tiny: bool) -> dict[str, Any]:
    adapter = {"targets": [{"layers": "**.attn.**", "factor": 3}]} if tiny else {"preset": "libreflux-600m"}
    caption = (folder / "photos" / "0.txt").read_text(encoding="utf-8")
    return {
        "model": str(folder),
        "base": "int8",
        "gradient_checkpointing": True,
        "data": [{"path": str(folder / "photos"), "caption_dropout": 0.0}],
        "resolution": SIDE,
        "adapter": adapter,
        "steps": 3,
        "optimizer": {"kind": "adamw_bf16", "learning_rate": 1e-5},
        "ema": [],
        "samples": {"every": 3, "prompts": [caption], "guidance": [3.5]},
        "save": {"every": 3, "keep": 1},
        "text_precision": "bf16",
        "device": "cpu",
        "cache": str(folder / "cache"),
        "out": str(folder / "run"),
    }


def write_pictures(folder: Path) -> None:
    """Three pictures with captions of 64 tokens."""
    photos, random = folder / "photos", np.random.default_rng(0)
    photos.mkdir(exist_ok=True)
    tokenizer = load_t5_tokenizer(folder / "tokenizer_2")
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(photos / f"{number}.png")
        words = ["a red apple"]
        while len(tokenizer(" ".join([*words, "fox"]))["input_ids"]) <= TOKENS:
            words.append("fox")
        (photos / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")


class _Told(RunRecorder):
    """Seconds of steps and of the picture, and what passed through each linear in the first step."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.begun = time.perf_counter()
        self.found: dict[str, Any] = {"steps": [], "losses": []}

    def on_start(self, started: Started) -> None:
        self.found["start"] = time.perf_counter() - self.begun
        super().on_start(started)

    def on_step(self, info: StepInfo) -> None:
        self.found["steps"].append(info.seconds)
        self.found["losses"].append(info.loss)
        super().on_step(info)

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        from benchmarks.full_size import peak, shapes_of

        self.found["peak of training"] = peak()
        seen, hooks = shapes_of(transformer)
        begun = time.perf_counter()
        super().on_sample(step, transformer)
        self.found["sample"] = time.perf_counter() - begun
        for hook in hooks:
            hook.remove()
        self.found["shapes"] = [[*shape, count] for shape, count in seen.items()]


def run(folder: Path, *, tiny: bool) -> None:
    """The process that trains; prints what it found as JSON."""
    from benchmarks.full_size import peak

    recipe = Recipe.model_validate(recipe_tree(folder, tiny=tiny))
    told = _Told(recipe)
    with told:
        fit(recipe, told)
    print(json.dumps({**told.found, "peak": peak()}))


def estimated(folder: Path, *, tiny: bool) -> float:
    """GiB, of the largest phase once all is encoded."""
    told = dry_run(recipe_tree(folder, tiny=tiny)).verdict
    phases = [told.estimate.training, *told.estimate.between]
    return max(phase.peak for phase in phases) / 2**30


def train(folder: Path, options: argparse.Namespace) -> int:
    """The whole of it: prints a table."""
    from benchmarks.full_size import dense_seconds

    write_pictures(folder)
    more = ["--tiny"] if options.tiny else []
    command = [sys.executable, "-m", "benchmarks.full_size", "--folder", str(folder), *more]
    if done := subprocess.run([*command, "--prepare"], check=False).returncode:
        return done
    child = subprocess.run([*command, "--fit"], check=False, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        return child.returncode
    found = json.loads(child.stdout.splitlines()[-1])
    wanted = estimated(folder, tiny=options.tiny)
    passes: Counter[tuple[int, int, int]] = Counter()
    for rows, columns, out, count in found["shapes"]:
        passes[rows, columns, out] += count
    dense = dense_seconds(passes, 0.01 if options.tiny else 0.3)
    one = sum(dense[shape] * count for shape, count in passes.items()) / _passes(folder)
    flops = sum(2 * rows * columns * out * count for (rows, columns, out), count in passes.items()) / _passes(folder)
    quickest = min(found["steps"])
    print(f"| start: base, adapter, hashes | {found['start']:.0f} s |")
    print(f"| training steps, {SIDE} px, {TOKENS} tokens | {', '.join(f'{s:.1f}' for s in found['steps'])} s |")
    print(f"| their losses | {', '.join(f'{loss:.3f}' for loss in found['losses'])} |")
    print(f"| its passes through the base as dense bf16 | {3 * one:.1f} s, {flops / one / 1e12:.2f} TFLOP/s |")
    print(f"| share of matmul speed, the adapter's own products not counted | {3 * one / quickest:.0%} |")
    print(f"| a picture of two guided steps, VAE included | {found['sample']:.1f} s |")
    print(f"| peak of training, VmHWM | {found['peak of training']:.2f} GiB |")
    print(f"| peak of all, VmHWM | {found['peak']:.2f} GiB |")
    print(f"| estimated | {wanted:.2f} GiB, {wanted / found['peak']:.2f} of the peak |")
    return 0


def _passes(folder: Path) -> int:
    """Forward passes of the picture: two for each of its steps."""
    return 2 * int(json.loads((folder / "libreflux.json").read_text(encoding="utf-8"))["steps"])


def prepare(folder: Path, *, tiny: bool) -> None:
    """The process that encodes."""
    prepare_recipe(Recipe.model_validate(recipe_tree(folder, tiny=tiny)), device="cpu")

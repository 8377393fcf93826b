"""Runs of `fit`: what every step saw and lost, and what they took of the card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from gpu.alone import DEVICE
from libreflux.data.held_out import HeldOut
from libreflux.data.index import text_key
from libreflux.data.prepare import prepare_cache
from libreflux.probing.held_out import measure_held_out
from libreflux.recipe import Recipe
from libreflux.training import step
from libreflux.training.callbacks import Callbacks, Started, StepInfo
from libreflux.training.estimate import estimate_recipe
from libreflux.training.loop import fit


class Recorder(Callbacks):
    """A line of JSON for each step in a file that outlives a kill, and the held-out loss whenever it is due."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.file = recipe, Path(recipe.out).parent / f"{Path(recipe.out).name}.seen"
        self.noise, self.measured = hashlib.sha256(), list[float]()
        self.held_out: HeldOut | None = None
        self.peak = 0

    def drawn(self, *arguments: Any) -> Tensor:
        """`keyed_noise`, with its numbers in the digest of the step."""
        noise = self.real(*arguments)
        self.noise.update(noise.numpy().tobytes())
        return noise

    def __enter__(self) -> Recorder:
        self.real = step.keyed_noise
        self.patch = mock.patch.object(step, "keyed_noise", self.drawn)
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()

    def on_start(self, started: Started) -> None:
        self.held_out = started.held_out
        if DEVICE.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()

    def on_step(self, info: StepInfo) -> None:
        data = {"ids": list(info.sample_ids), "sigmas": list(info.sigmas), "noise": self.noise.hexdigest()}
        self.noise = hashlib.sha256()
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": info.step, "data": data, "loss": info.loss}) + "\n")
        if DEVICE.startswith("cuda"):
            self.peak = torch.cuda.max_memory_allocated()

    def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: HeldOut) -> None:
        assert self.held_out is not None
        found = measure_held_out(transformer, self.held_out, sigmas=(0.3, 0.7), batch=self.recipe.batch)
        self.measured.append(float(found.loss.value.mean()))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]


def _fit(tree: dict[str, Any]) -> Recorder:
    recipe = Recipe.model_validate(tree)
    with Recorder(recipe) as recorder:
        fit(recipe, recorder)
    return recorder


def run(recipe: dict[str, Any]) -> None:
    """Trains; what the steps saw is in OUT.seen."""
    _fit(recipe)


def beside_the_cpu(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trains on the card, measured before and after, and `steps` steps of the same on the CPU, on one cache."""
    prepare_cache(Recipe.model_validate(recipe), device="cpu")
    found: dict[str, Any] = {}
    for name, device, count in (("there", DEVICE, recipe["steps"]), ("here", "cpu", steps)):
        held_out = {**recipe["held_out"], "every": count if name == "there" else 0}
        tree = {"steps": count, "device": device, "held_out": held_out, "out": f"{recipe['out']}-{name}"}
        recorder = _fit({**recipe, **tree})
        found[name] = {"rows": recorder.rows(), "held_out": recorder.measured}
    return found


def peak(recipe: dict[str, Any]) -> dict[str, int]:
    """Bytes at the peak of the steps, as estimated and as the card's allocator counted them."""
    made = Recipe.model_validate(recipe)
    cache, sources = prepare_cache(made)
    captions = {caption for _, samples in sources for sample in samples for caption in sample.captions}
    tokens = int(cache.token_counts([text_key(caption) for caption in captions]).max())
    return {"estimate": estimate_recipe(made, text_tokens=tokens).training.peak, "peak": _fit(recipe).peak}

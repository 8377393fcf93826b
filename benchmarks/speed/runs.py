"""What surrounds the steps: preparing a cache, checkpoints, the start of a run, and the estimate beside the peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.passes import adapted
from benchmarks.speed.results import Figure
from benchmarks.speed.sizes import PADDED, Size, network
from benchmarks.speed.theirs import RATE
from benchmarks.speed.timing import Contender, Run, wait
from safetensors.torch import load_file

from libreflux.adapter.io import load_adapter, save_adapter
from libreflux.data.cache import Cache
from libreflux.data.index import text_key
from libreflux.data.prepare import prepare_cache
from libreflux.emoji.compose import write_folder
from libreflux.model.opening import open_model
from libreflux.model.stream import save_live
from libreflux.recipe import OptimizerSpec, Recipe
from libreflux.training import checkpoint
from libreflux.training.optimizer import make_optimizer

SAVE = "ours: files, hashes, one rename"
TORCH_SAVE = "torch.save"
ESTIMATED = {"emoji": ("emoji",), "slice": ("emoji", "1b"), "full": ()}
"""Runs of benchmarks/memory.py by size; "1b" is the slice, in bf16."""


def emoji_recipe(work: Path, **changes: Any) -> Recipe:
    """Of the emoji family on pictures in WORK/photos."""
    tree = {
        "model": "emoji-base",
        "data": [{"path": str(work / "photos")}],
        "resolution": 128,
        "adapter": {"targets": [{"layers": "**", "factor": 2}]},
        "batch": 4,
        "steps": 1,
        "samples": {"every": 0},
        "cache": str(work / "cache"),
        "out": str(work / "run"),
    }
    return Recipe.model_validate(tree | changes)


def prepared(work: Path, count: int, device: str) -> list[Figure]:
    """Pictures and captions a second, start of the encoders included, and the bytes of a caption."""
    write_folder(work / "photos", count, 1)
    figures = []
    for kind in ("bf16", "int8"):
        recipe = emoji_recipe(work, cache=str(work / f"cache-{kind}"), text_cache=kind, device=device)
        clock = Stages()
        cache, sources = prepare_cache(recipe, device=device, progress=clock)
        captions = sorted({caption for _, samples in sources for sample in samples for caption in sample.captions})
        if kind == "bf16":
            figures += [
                Figure("pictures", clock.rate("crops/s"), "pictures/s"),
                Figure("captions", clock.rate("a caption"), "captions/s"),
                *_padded(cache, captions),
            ]
        size = sum(file.stat().st_size for file in Path(recipe.cache_dir).rglob("text*.safetensors"))
        figures.append(Figure(f"bytes a caption, ours in {kind}", size / (len(captions) + 1), "bytes"))
    return figures


def _padded(cache: Cache, captions: list[str]) -> list[Figure]:
    """What a cache of equally long texts holds."""
    config = open_model("emoji-base").part_config("transformer")
    numbers = PADDED * config["joint_attention_dim"] + config["pooled_projection_dim"]
    tokens = cache.token_counts([text_key(caption) for caption in captions])
    return [
        Figure("tokens of a caption, mean", float(tokens.mean()), "tokens"),
        Figure(f"bytes a caption, padded to {PADDED}, fp32", 4.0 * numbers, "bytes"),
        Figure(f"bytes a caption, padded to {PADDED}, bf16", 2.0 * numbers, "bytes"),
    ]


class Stages:
    """A `Progress` that notes what was done in which stage, by the end of its note."""

    def __init__(self) -> None:
        self.done, self.seconds = 0, {"crops/s": 0.0, "a caption": 0.0}
        self.counts = {"crops/s": 0, "a caption": 0}
        self.last = time.perf_counter()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.perf_counter()
        for stage in self.seconds:
            if note.endswith(stage):
                self.seconds[stage] += now - self.last
                self.counts[stage] += done - self.done
        self.done, self.last = done, now

    def rate(self, stage: str) -> float | None:
        return self.counts[stage] / self.seconds[stage] if self.counts[stage] else None


def checkpoints(size: Size, work: Path, device: str) -> tuple[list[Contender], list[Contender]]:
    """(saving, loading) an adapter and its optimizer's state; contenders share the adapter."""
    adapter = adapted(size, network(size, device))
    spec = OptimizerSpec(kind="adamw_bf16", learning_rate=RATE)
    optimizer = make_optimizer(spec, adapter.named_parameters(), 0)
    tensors = adapter.state_dict() | optimizer.state_dict_tensors()
    run, other = work / "checkpoints", work / "state.pt"
    numbers = iter(range(1, 1000))

    def save() -> None:
        writers: dict[str, Callable[[Path], None]] = {
            checkpoint.ADAPTER: lambda path: save_adapter(adapter, path),
            checkpoint.OPTIMIZER: lambda path: save_live(path, optimizer.state_dict_tensors()),
        }
        checkpoint.write(run, next(numbers), writers, {})
        checkpoint.prune(run, 1, None)

    def load() -> None:
        newest = checkpoint.latest(run)
        if newest is None:
            raise RuntimeError("no checkpoint was saved")
        adapter.load_state_dict(load_adapter(newest.adapter).tensors)
        optimizer.load_state_tensors(load_file(newest.optimizer))

    def torch_load() -> None:
        stored = torch.load(other, map_location=device, weights_only=True)
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])

    def made(work: Callable[[], None]) -> Run:
        wait(device)
        return work

    saving = [
        Contender(SAVE, partial(made, save), ours=True, counted=False),
        Contender(TORCH_SAVE, partial(made, lambda: torch.save(tensors, other)), counted=False),
    ]
    loading = [
        Contender("ours: hashes compared, then read", partial(made, load), ours=True, counted=False),
        Contender("torch.load", partial(made, torch_load), counted=False),
    ]
    return saving, loading


def starts(work: Path, device: str) -> list[Contender]:
    """A training run in a new process until its first step is written down, the cache being there."""
    write_folder(work / "photos", 8, 1)
    prepare_cache(emoji_recipe(work))
    numbers = iter(range(1000))

    def train() -> None:
        recipe = emoji_recipe(work, device=device, out=str(work / f"run-{next(numbers)}"))
        file = work / "recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        _run([sys.executable, "-m", "libreflux", "train", str(file)])

    def imports() -> None:
        _run([sys.executable, "-c", "import torch, diffusers.models, transformers.models.t5.modeling_t5"])

    return [
        Contender("libreflux train, one step, saved", lambda: train, ours=True, counted=False, elsewhere=True),
        Contender("importing torch, diffusers and transformers alone", lambda: imports, counted=False, elsewhere=True),
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:])


def estimates(size: str, work: Path) -> list[Figure]:
    """Of benchmarks/memory.py's runs: MiB of the training phase, as estimated and as measured on the CPU."""
    from benchmarks import memory

    figures = []
    for name in ESTIMATED[size]:
        folder = work / name
        folder.mkdir()
        memory.child(name, str(folder))
        found = json.loads(memory.child("training", str(folder)).splitlines()[-1])
        for phase, measured in found["measured"].items():
            estimated, told = found["estimated"][phase], "the slice in bf16" if name == "1b" else f"{name} recipe"
            figures += [
                Figure(f"{told}, {phase}: estimated", estimated, "MiB"),
                Figure(f"{told}, {phase}: measured peak", measured, "MiB"),
                Figure(f"{told}, {phase}: estimate over peak", estimated / measured, ""),
            ]
    return figures

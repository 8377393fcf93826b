"""The estimate of `train --dry-run` beside the measured peaks of a real run on a CPU, phase by phase.

    python benchmarks/memory.py [emoji|250m|1b|parts]... [--only training|between|preparing]... [--phases]

Each run has a recipe of its own: a model folder of random weights and pictures. Three processes measure it: `training`
is `fit` on a prepared cache, three steps and a checkpoint; `between` is `fit` of one step, before which held-out
pictures are measured and a sample is drawn; `preparing` fills a cache from nothing. Peak memory is the process's
maximum resident set (VmHWM), less what it holds when everything is imported and has worked once: before it, a toy run
of one picture pages in the libraries' code, starts the threads and is freed. Prints one line per phase.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from libreflux.model.single_file import CONFIGS

MIB = 2**20
KINDS = ("training", "between", "preparing")
TOY = {"resolution": 64, "batch": 1, "steps": 1}
FLUX_HEADS = {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}


def _layers(factor: int) -> dict[str, Any]:
    return {"adapter": {"targets": [{"layers": "**", "factor": factor}]}}


# Name -> configurations (changes to emoji-base's, by part), words of a caption, recipe.
RUNS: dict[str, tuple[dict[str, dict[str, Any]], int, dict[str, Any]]] = {
    "emoji": (
        {"transformer": {}},
        30,
        {"resolution": 128, "batch": 16, "optimizer": {"kind": "adamw"}, **_layers(2)},
    ),
    "250m": (
        {"transformer": {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, **FLUX_HEADS}},
        100,
        {"resolution": 256, "batch": 2, **_layers(4)},
    ),
    "1b": (
        {"transformer": {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 24, **FLUX_HEADS}},
        200,
        {"resolution": 256, "batch": 1, **_layers(4)},
    ),
    "parts": (  # FLUX.1's own VAE and T5's large size, beside a small transformer
        {
            "transformer": {"num_attention_heads": 8, **FLUX_HEADS, "joint_attention_dim": 1024},
            "vae": json.loads((CONFIGS / "vae.json").read_text()),
            "text_encoder_2": {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_heads": 16, "num_layers": 12},
        },
        100,
        {"resolution": 256, "batch": 2, **_layers(4)},
    ),
}


def make(name: str, folder: Path) -> None:
    """FOLDER/model, /photos, /cache and /recipe.json of a run."""
    import numpy as np
    from PIL import Image

    from libreflux.data.prepare import prepare_cache
    from libreflux.model.facts import read_facts, write_facts
    from libreflux.model.locate import locate

    changes, words, keys = RUNS[name]
    shutil.copytree(locate("emoji-base"), folder / "model", ignore=shutil.ignore_patterns("checksums.json"))
    for part, change in changes.items():
        _random_part(folder / "model" / part, change)
    write_facts(folder / "model", dataclasses.replace(read_facts(folder / "model"), steps=2))
    (folder / "photos").mkdir()
    random, side = np.random.default_rng(0), keys["resolution"]
    for number in range(keys["batch"] * 3):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"photos/{number}.png")
        (folder / f"photos/{number}.txt").write_text("red apple " * (words // 2) + str(number))
    (folder / "apart").mkdir()
    for number in range(keys["batch"]):
        noise = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"apart/{number}.png")
        (folder / f"apart/{number}.txt").write_text("red apple " * (words // 2) + str(number))
    tree = {
        "model": str(folder / "model"),
        "base": "bf16",
        "data": [{"path": str(folder / "photos")}],
        "steps": 3,
        "samples": {"every": 0},
        "device": "cpu",
        "cache": str(folder / "cache"),
        "out": str(folder / "run"),
        **keys,
    }
    (folder / "recipe.json").write_text(json.dumps(tree))
    for recipe in (tree, {**tree, **_between(folder)}):
        prepare_cache(_recipe(recipe))


def _random_part(folder: Path, change: dict[str, Any]) -> None:
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    config = {**json.loads((folder / "config.json").read_text()), **change}
    config.pop("quantization_config", None)  # emoji-base is stored in int8
    shutil.rmtree(folder)
    torch.set_default_dtype(torch.bfloat16)
    kinds: dict[str, Any] = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
    if folder.name in kinds:
        made = kinds[folder.name].from_config(config)
    else:
        made = T5EncoderModel(T5Config.from_dict(config)).to(torch.bfloat16)
    made.save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def _between(folder: Path) -> dict[str, Any]:
    prompt = (folder / "photos/0.txt").read_text()
    samples = {"every": 10**6, "at_start": True, "prompts": [prompt], "guidance": [3]}
    held_out = {"path": str(folder / "apart"), "every": 10**6, "pictures": 64, "sigmas": [0.5]}
    return {"samples": samples, "held_out": held_out, "steps": 1, "ema": [], "out": str(folder / "short")}


class Meter:
    """MiB above what the process held at `begin`, the most in each stretch that ends with a mark."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.imported, self.before = status("VmRSS"), 0.0

    def begin(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = status("VmRSS")
        self._anew()

    def mark(self, phase: str) -> None:
        self.phases[phase] = max(self.phases.get(phase, 0.0), status("VmHWM") - self.before)
        self._anew()

    def _anew(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew


def measure(what: str, folder: Path) -> dict[str, Any]:
    """MiB by phase, estimated and measured, of one kind of process; see the module."""
    from libreflux.data.cache import Cache
    from libreflux.data.index import text_key
    from libreflux.training.estimate import estimate_recipe

    tree = json.loads((folder / "recipe.json").read_text())
    if what == "between":
        tree |= _between(folder)
    recipe = _recipe(tree)
    captions = [path.read_text() for path in (folder / "photos").glob("*.txt")]
    tokens = int(Cache(recipe.cache_dir).token_counts([text_key(caption) for caption in captions]).max())
    found = estimate_recipe(recipe, text_tokens=tokens, captions=len(captions) + 1)
    meter = Meter()
    toy = {**tree, **TOY, "model": "emoji-base", "out": str(folder / "toy"), "cache": str(folder / "toy-cache")}
    work = _prepare if what == "preparing" else _train
    work(toy, Meter())
    meter.begin()
    work(tree, meter)
    phases = {"training": [found.training], "between": found.between, "preparing": found.preparing}[what]
    estimated = {phase.name.split(",")[0]: phase for phase in phases}
    return {
        "estimated": {name: phase.peak / MIB for name, phase in estimated.items()},
        "held": {name: phase.held / MIB for name, phase in estimated.items()},
        "activations": {name: phase.activations / MIB for name, phase in estimated.items()},
        "measured": {name: meter.phases[name] for name in estimated},
        "above imports": meter.before - meter.imported,
        "phases": meter.phases,
        "tokens": tokens,
    }


def _train(tree: dict[str, Any], meter: Meter) -> None:
    from diffusers import FluxTransformer2DModel

    from libreflux.data.held_out import HeldOut
    from libreflux.training.callbacks import Started, StepInfo
    from libreflux.training.loop import fit
    from libreflux.workflows.run_record import RunRecorder

    class Marks(RunRecorder):
        def on_start(self, started: Started) -> None:
            meter.mark("loading")
            super().on_start(started)

        def on_step(self, info: StepInfo) -> None:
            meter.mark("training")

        def on_save(self, step: int, folder: Path) -> None:
            meter.mark("training")

        def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: HeldOut) -> None:
            super().on_measure(step, transformer, held_out)
            meter.mark("measuring held-out pictures" if step == 0 else "after the last step")

        def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
            super().on_sample(step, transformer)
            meter.mark("drawing samples" if step == 0 else "after the last step")

    recipe = _recipe(tree)
    with Marks(recipe) as marks:
        fit(recipe, marks)
    meter.mark("training")


def _prepare(tree: dict[str, Any], meter: Meter) -> None:
    from libreflux.data.prepare import prepare_cache

    def told(done: int, total: int, note: str = "") -> None:
        crops, texts = note.endswith("crops/s"), note.endswith("a caption")
        meter.mark("preparing pictures" if crops else "preparing captions" if texts else "reading")

    prepare_cache(_recipe({**tree, "cache": f"{tree['cache']}-anew"}), progress=told)


def status(key: str) -> float:
    """MiB of a row of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def _recipe(tree: dict[str, Any]) -> Any:
    from libreflux.recipe import Recipe

    return Recipe.model_validate(tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--phases", action="store_true", help="also print the measured memory by phase")
    parser.add_argument("--work", nargs=2, metavar=("VERB", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--only", action="append", choices=KINDS, help="of the three processes; default: all")
    options = parser.parse_args()
    if options.work:
        verb, folder = options.work
        if verb in KINDS:
            print(json.dumps(measure(verb, Path(folder))))
        else:
            make(verb, Path(folder))
        return
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"no such run: {', '.join(unknown)}")
    print(f"{'run':<8}{'phase':<30}{'estimated':>12}{'measured':>12}{'ratio':>8}   (MiB)")
    for name in options.runs or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            child(name, folder)
            for kind in options.only or KINDS:
                found = json.loads(child(kind, folder).splitlines()[-1])
                for phase, measured in found["measured"].items():
                    estimated = found["estimated"][phase]
                    row = f"{name:<8}{phase:<30}{estimated:>12,.0f}{measured:>12,.0f}{estimated / measured:>8.2f}"
                    print(row, flush=True)
                if options.phases:
                    print("".join(f"    {key}: {value}\n" for key, value in found.items()), flush=True)


def child(verb: str, folder: str) -> str:
    """What a process of its own prints: VERB is a name of `RUNS`, which is made in the folder, or one of `KINDS`."""
    command = [sys.executable, __file__, "--work", verb, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()

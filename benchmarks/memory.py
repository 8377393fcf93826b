"""The estimate of `train --dry-run` beside the measured peak of a real run on a CPU.

    python benchmarks/memory.py [emoji|250m|1b]... [--phases]

Each run is `fit` on a recipe of its own: a model folder of random weights, pictures, a prepared cache, three steps and
a checkpoint, in a process of its own. Peak memory is the process's maximum resident set (VmHWM), less what it holds
when everything is imported and has worked once: before it, a toy run of one picture pages in the libraries' code,
starts the threads and is freed. Prints one line per recipe, with the peak above the bare imports for comparison.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
TOY = {"resolution": 64, "batch": 1, "steps": 1}
FLUX_HEADS = {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}


def _layers(factor: int) -> dict[str, Any]:
    return {"adapter": {"targets": [{"layers": "**", "factor": factor}]}}


# Name -> transformer configuration (on emoji-base's), words of a caption, recipe.
RUNS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "emoji": (
        {},
        30,
        {"resolution": 128, "batch": 16, "optimizer": {"kind": "adamw"}, **_layers(2)},
    ),
    "250m": (
        {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, **FLUX_HEADS},
        100,
        {"resolution": 256, "batch": 2, **_layers(4)},
    ),
    "1b": (
        {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 24, **FLUX_HEADS},
        200,
        {"resolution": 256, "batch": 1, **_layers(4)},
    ),
}


def make(name: str, folder: Path) -> None:
    """FOLDER/model, /photos, /cache and /recipe.json of a run."""
    import numpy as np
    import torch
    from diffusers import FluxTransformer2DModel
    from PIL import Image

    from libreflux.data.prepare import prepare_cache
    from libreflux.model.locate import locate

    changes, words, keys = RUNS[name]
    shutil.copytree(locate("emoji-base"), folder / "model")
    config = {**json.loads((folder / "model/transformer/config.json").read_text()), **changes}
    shutil.rmtree(folder / "model/transformer")
    torch.set_default_dtype(torch.bfloat16)
    FluxTransformer2DModel.from_config(config).save_pretrained(folder / "model/transformer")
    torch.set_default_dtype(torch.float32)
    (folder / "photos").mkdir()
    random, side = np.random.default_rng(0), keys["resolution"]
    for number in range(keys["batch"] * 3):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"photos/{number}.png")
        (folder / f"photos/{number}.txt").write_text("red apple " * (words // 2) + str(number))
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
    for recipe in (tree, {**tree, **TOY}):
        prepare_cache(_recipe(recipe))


def measure(folder: Path) -> dict[str, float]:
    """MiB: estimated and measured peak of a run that was made, and the measured by phase."""
    import torch

    from libreflux.data.cache import Cache
    from libreflux.data.index import text_key
    from libreflux.train.callbacks import Callbacks, Started, StepInfo
    from libreflux.train.estimate import estimate_recipe
    from libreflux.train.loop import fit

    tree = json.loads((folder / "recipe.json").read_text())
    recipe = _recipe(tree)
    captions = [path.read_text() for path in (folder / "photos").glob("*.txt")]
    tokens = int(Cache(recipe.cache_dir).token_counts([text_key(caption) for caption in captions]).max())
    found = estimate_recipe(recipe, text_tokens=tokens)
    imported = status("VmRSS")
    fit(_recipe({**tree, **TOY, "model": "emoji-base", "out": str(folder / "toy"), "cache": str(folder / "toy-cache")}))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, files = status("VmRSS"), status("RssFile")
    phases: dict[str, float] = {}

    def mark(phase: str) -> None:
        phases[phase] = max(phases.get(phase, 0.0), status("VmHWM") - before)
        phases[f"after {phase}"] = status("VmRSS") - before
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew

    class Marks(Callbacks):
        def on_start(self, started: Started) -> None:
            mark("load")

        def on_step(self, info: StepInfo) -> None:
            mark(f"step {info.step}")
            phases[f"seconds of {info.step}"] = info.seconds

        def on_save(self, step: int, folder: Path) -> None:
            mark("save")

    Path("/proc/self/clear_refs").write_text("5")
    fit(recipe, Marks())
    mark("end")
    return {
        "estimated": found.total / MIB,
        "measured": max(value for name, value in phases.items() if "seconds" not in name),
        "weights": found.weights / MIB,
        "adapter": found.adapter / MIB,
        "averages": found.averages / MIB,
        "activations": found.activations / MIB,
        "update": found.update / MIB,
        "tokens": tokens,
        "imported": imported,
        "baseline": before,
        "files after": status("RssFile") - files,
        "threads": torch.get_num_threads(),
        **phases,
    }


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
    options = parser.parse_args()
    if options.work:
        verb, folder = options.work
        if verb == "measure":
            print(json.dumps(measure(Path(folder))))
        else:
            make(verb, Path(folder))
        return
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"no such run: {', '.join(unknown)}")
    print(f"{'run':<8}{'estimated':>12}{'measured':>12}{'ratio':>8}{'above imports':>15}   (MiB)")
    for name in options.runs or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            for verb in (name, "measure"):
                command = [sys.executable, __file__, "--work", verb, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        estimated, measured = found["estimated"], found["measured"]
        line = f"{name:<8}{estimated:>12,.0f}{measured:>12,.0f}{estimated / measured:>8.2f}"
        print(f"{line}{measured + found['baseline'] - found['imported']:>15,.0f}", flush=True)
        if options.phases:
            print("".join(f"    {key:<16}{value:>10,.2f}\n" for key, value in found.items()))


if __name__ == "__main__":
    main()

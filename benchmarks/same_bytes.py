"""The bytes of a fixed set of commands, to compare two versions of this package on one machine.

    python benchmarks/same_bytes.py make OUT             # runs every command with the libreflux that Python imports
    python benchmarks/same_bytes.py compare OLD NEW      # two such folders; ends in 1 if a file differs
    python benchmarks/same_bytes.py reopen OLD NEW       # NEW: OLD's runs resumed, its caches and results used again

A restructuring must not change a byte that a user keeps. The set: adapters trained on the emoji family (LoKr, LoRA,
int8 base, distillation, two processes), pictures over `generate`'s options, a grid, averages, a merge, exports of each
kind, a probe with its comparison, and the keys of recipes. About ten minutes on two cores.

`reopen` takes the folder of an older version: its unfinished runs are resumed, its finished run, cache, grid and probe
are used again by the same commands, and the result must equal what `make` of the older version gave.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

RECIPE = """\
model: emoji-base
base: bf16
data: [{path: photos, caption_dropout: 0.2, crops_per_picture: 2}]
resolution: 64
adapter: {targets: [{layers: "**", factor: 4}]}
batch: 2
accumulate: 2
steps: 4
optimizer: {kind: adamw_bf16, learning_rate: 1e-3, warmup: 2}
ema: [0.1]
samples: {every: 2, at_start: true, prompts: ["a fox on yellow"], guidance: [1, 3]}
held_out: {share: 0.2, every: 2, sigmas: [0.3, 0.7], pictures: 4}
save: {every: 2, keep: 4}
device: cpu
threads: 1
cache: cache
"""
LORA = ["adapter.kind=lora", "adapter.rank=4", 'adapter.targets=[{layers: "**"}]']
PROMPTS = ["a fox on yellow", "a rocket on blue"]
DRAW = ["--device", "cpu", "--width", "64", "--height", "64", "--seed", "7"]
TRAINED = {
    "lokr": [],
    "lora": [*LORA, "optimizer.kind=adamw"],
    "int8": ["base=int8", "gradient_checkpointing=true"],
    "distil": ["objective=distil", "distil.steps=4", "held_out.share=0"],
    "two": [],  # under torchrun
}
PICTURES = {
    "plain": [PROMPTS[0]],
    "base": [PROMPTS[0], "--model", "emoji-base", "--guidance", "3", "--steps", "6"],
    "schnell": [PROMPTS[1], "--model", "emoji-schnell"],
    "negative": [PROMPTS[0], "--negative", "blue", "--guidance", "3.5", "--steps", "6"],
    "rescale": [PROMPTS[0], "--guidance", "4", "--guidance-rescale", "0.5", "--steps", "6", "--batch-cfg", "off"],
    "interval": [PROMPTS[0], "--guidance", "4", "--guidance-start", "0.2", "--guidance-stop", "0.8", "--steps", "6"],
    "until": [PROMPTS[0], "--guidance", "4", "--no-cfg-until", "2", "--steps", "6"],
    "sigmas": [PROMPTS[0], "--sigmas", "1,0.75,0.5,0.25", "--prompt-2", "a rocket"],
    "adapter": [PROMPTS[0], "--adapter", "runs/lokr:0.8", "--guidance", "2", "--steps", "6"],
    "lora": [PROMPTS[0], "--adapter", "runs/lora", "--tile", "--offload", "none"],
    "several": [*PROMPTS, "--count", "2", "--steps", "2", "--quantize", "int8"],
    "short": [PROMPTS[0], "--max-tokens", "2", "--steps", "2", "--model", "merged"],
}
EXPORTS = {
    "dense": ["emoji-libre", "--for", "diffusers"],
    "bfl": ["emoji-libre", "--for", "bfl"],
    "int8": ["merged", "--int8"],
    "lora-diffusers.safetensors": ["runs/lora", "--for", "diffusers"],
    "lora-kohya.safetensors": ["runs/lora", "--for", "kohya"],
    "lokr-comfyui.safetensors": ["runs/lokr", "--for", "comfyui"],
    "lokr-lycoris.safetensors": ["runs/lokr", "--for", "lycoris"],
    "lokr-rank.safetensors": ["runs/lokr", "--for", "diffusers", "--rank", "4"],
}
REMADE = ["--adapter", "runs/lokr:0.8", "--out", "pictures/remade.png", "--device", "cpu"]
PROBE = ["--against", "emoji-schnell", "--quick", "--pictures", "4", "--prompts", "2", "--guidance", "1,4"]
PROBE += ["--steps", "6,2", "--resolution", "64", "--device", "cpu", "--out", "probe"]
GRID = [*PROMPTS, "--model", "emoji-libre", "--guidance", "1,3", "--steps", "3", "--seeds", "0:1", "--width", "64"]
GRID += ["--height", "64", "--device", "cpu", "--out", "grid"]


def libreflux(folder: Path, *arguments: str, processes: int = 1) -> None:
    """A command, run in `folder`; ends this program if it fails."""
    began = time.monotonic()
    command = [*_python(processes), "-m", "libreflux", *arguments]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    print(f"{time.monotonic() - began:6.1f} s  libreflux {' '.join(arguments)}", flush=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def _python(processes: int) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(several if processes > 1 else [])]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def make(folder: Path) -> None:
    """Every command of the set, in an empty folder."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    libreflux(folder, "demo-data", "photos", "--count", "24", "--seed", "3")
    for name, changes in TRAINED.items():
        libreflux(folder, *_train(name, changes), processes=2 if name == "two" else 1)
    for name, changes in TRAINED.items():
        if name != "two":
            _stop_midway(folder, f"stopped-{name}", changes)
    libreflux(folder, "average", "runs/lokr", "--width", "0.1", "--out", "average.safetensors")
    libreflux(folder, "average", "runs/lokr", "--lerp", "0.5", "--out", "lerp.safetensors")
    libreflux(folder, "merge", "emoji-base", "runs/lokr:0.7", "runs/lora", "--out", "merged")
    for name, arguments in EXPORTS.items():
        (folder / "exports").mkdir(exist_ok=True)
        libreflux(folder, "export", *arguments, "--out", f"exports/{name}")
    for name, arguments in PICTURES.items():
        single = [".png"] if arguments[0:2] != PROMPTS else [""]
        libreflux(folder, "generate", *arguments, *DRAW, "--out", f"pictures/{name}{single[0]}")
    libreflux(folder, "generate", "--remake", "pictures/adapter.png", *REMADE)
    libreflux(folder, "grid", *GRID)
    libreflux(folder, "probe", "merged", *PROBE)
    (folder / "keys.json").write_text(json.dumps(_recipe_keys(), indent=1), encoding="utf-8")


def _train(name: str, changes: list[str]) -> list[str]:
    return ["train", "recipe.yaml", f"out=runs/{name}", *changes]


def _stop_midway(folder: Path, name: str, changes: list[str]) -> None:
    """A run that was asked to stop after its first checkpoint; exit code 143 says that it did."""
    command = [*_python(1), "-m", "libreflux", *_train(name, changes)]
    process = subprocess.Popen(command, cwd=folder, env=_environment(), stderr=subprocess.DEVNULL)
    checkpoints = folder / "runs" / name / "checkpoints"
    while process.poll() is None and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    print(f"          stopped {name}, exit code {process.wait()}", flush=True)


def reopen(old: Path, new: Path) -> None:
    """A copy of `old` in which what was begun there is finished, and what was finished is asked for again."""
    shutil.copytree(old, new)
    before = {name: (new / name).stat().st_mtime_ns for name in _kept(new)}
    for name, changes in TRAINED.items():
        libreflux(new, *_train(name, changes), processes=2 if name == "two" else 1)
    libreflux(new, "generate", *PICTURES["short"], *DRAW, "--model", "exports/int8", "--out", "from-int8.png")
    libreflux(new, "grid", *GRID)
    libreflux(new, "probe", "merged", *PROBE)
    again = [name for name, when in before.items() if (new / name).stat().st_mtime_ns != when]
    for name, changes in TRAINED.items():
        if name != "two":
            libreflux(new, *_train(f"stopped-{name}", changes))
            results = [(new / "runs" / run / "adapter.safetensors").read_bytes() for run in (name, f"stopped-{name}")]
            print(f"          {name}: a resumed run is {'equal' if results[0] == results[1] else 'ANOTHER'}")
    print("\n".join(f"made again: {name}" for name in again) or "nothing was made again")


def _kept(folder: Path) -> list[str]:
    places = [*folder.glob("cache/**/*.safetensors"), *folder.glob("grid/**/*.png"), *folder.glob("runs/*/*.safet*")]
    return sorted(str(path.relative_to(folder)) for path in places if path.is_file())


def compare(old: Path, new: Path) -> int:
    """Prints each file that differs; the number of them."""
    first, second = dict(contents(old)), dict(contents(new))
    differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    for name in differing:
        where = "only old" if name not in second else "only new" if name not in first else "differs"
        print(f"{where}: {name}")
    print(f"{len(first.keys() & second.keys())} files in both, {len(differing)} differ")
    return len(differing)


def contents(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file's SHA-256, without what must differ: times, rates, paths, the order of rows in a database."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name in (".lock", "lock") or path.suffix in (".sqlite3-wal", ".sqlite3-shm"):
            continue
        if path.name == "files.sqlite3" or name.startswith("runs/stopped-"):
            continue  # remembers times and inodes; how far a stopped run came is chance
        data = _rows(path) if path.suffix == ".sqlite3" else path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".html", ".yaml", ".md", ".txt", ".py"):
            data = re.sub(rb'"(pictures_per_second|seconds|time|created|date)": [^,}]+,?', b"", data)
            data = data.replace(str(folder.resolve()).encode(), b"FOLDER")
            data = re.sub(rb'"_name_or_path": "[^"]*"', b"", data)  # where this package is installed
        yield name, hashlib.sha256(data).hexdigest()


def _rows(path: Path) -> bytes:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        tables = sorted(row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
        found = [(table, sorted(map(repr, database.execute(f"SELECT * FROM {table}")))) for table in tables]
    return repr(found).encode()


def _recipe_keys() -> object:
    from libreflux.recipe import Recipe

    return Recipe.model_json_schema()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["make", "compare", "reopen"])
    parser.add_argument("folders", type=Path, nargs="+")
    chosen = parser.parse_args()
    folders = [folder.absolute() for folder in chosen.folders]
    if chosen.verb == "make":
        make(*folders)
    elif chosen.verb == "reopen":
        reopen(*folders)
    else:
        sys.exit(compare(*folders) > 0)


if __name__ == "__main__":
    main()

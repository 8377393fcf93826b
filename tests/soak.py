"""Kills real `libreflux train` processes at random instants, fills their disk, makes it read-only: `make soak`.

    python tests/soak.py [--kills 50] [--disks 4] [--seed 0] [--steps 200] [--seconds 200]

Each run is resumed by its own command until it is done, and must end with the bytes of one that was left alone. Full
and read-only disks are small tmpfs, which need the right to mount; without it they are left out, and that is said.
Each process is forked from one that has imported everything, which spares most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
from PIL import Image

from libreflux import files
from libreflux.cli import main as libreflux
from libreflux.training import checkpoint
from tiny import CAPTIONS, make_tiny_model

LANES = 2
EVERY = 5
RECIPE = """\
model: {model}
base: fp32
data: [{{path: {data}, crops_per_picture: 2, caption_dropout: 0.2}}]
resolution: 32
adapter: {{targets: [{{layers: "**", factor: 4}}]}}
batch: 2
optimizer: {{kind: adamw_bf16, learning_rate: 1e-3, warmup: 10}}
ema: [0.1]
samples: {{every: 10, at_start: true, prompts: ["a fox"], guidance: [1]}}
held_out: {{share: 0.2, every: 15, sigmas: [0.3, 0.7]}}
save: {{every: 5, keep: 2, keep_every: 100, averages_every: 25}}
device: cpu
threads: 1
cache: {cache}
"""


class Soak:
    """One folder of runs; counts what happened.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.counts, self.lock = folder, Counter[str](), threading.Lock()
        self.most_lost, self.until = 0, math.inf
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["libreflux.workflows.run_record", "libreflux.training.loop", "tiny"])
        data = folder / "data"
        data.mkdir()
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / f"{number}.png")
            (data / f"{number}.txt").write_text(f"{CAPTIONS[number % len(CAPTIONS)]} {number}\n", encoding="utf-8")
        model = make_tiny_model(folder / "model")
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(model=model, data=data, cache=folder / "cache"), encoding="utf-8")

    def start(self, run: Path, steps: int) -> ForkServerProcess:
        """`libreflux train`, its words in a file beside the run folder."""
        command = ["libreflux", "train", str(self.recipe), f"out={run}", f"steps={steps}"]
        self.said(run).write_bytes(b"")
        process = self.processes.Process(target=verb, args=(command, str(self.said(run))))
        process.start()
        return process

    def said(self, run: Path) -> Path:
        return self.folder / f"{run.parent.name}-{run.name}.err"

    def finish(self, run: Path, steps: int) -> None:
        code = ended(self.start(run, steps))
        assert code == 0, f"{run}: exit code {code}\n{self.said(run).read_text()}"

    def count(self, *names: str) -> None:
        with self.lock:
            self.counts.update(names)

    def look(self, run: Path) -> None:
        """After a kill: every checkpoint loads, and at most one interval of steps is lost."""
        found = checkpoint.listed(run)
        for one in found:
            files.verify_manifest(one.path)
        metrics = run / checkpoint.METRICS
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        lost = done - (found[-1].step if found else 0)
        assert lost <= EVERY, f"{run}: {lost} steps lost"
        with self.lock:
            self.most_lost = max(self.most_lost, lost)

    def compare(self, run: Path, whole: Path) -> None:
        """Every file has the same bytes; nothing is missing, nothing is left over."""
        of_whole, of_run = contents(whole), contents(run)
        assert sorted(of_run) == sorted(of_whole), f"{run}: {sorted(of_run.keys() ^ of_whole.keys())}"
        differing = [name for name in of_whole if of_whole[name] != of_run[name]]
        assert not differing, f"{run}: {differing} differ"
        litter = [str(path) for path in (*run.rglob(".*"), *run.rglob("damaged-*")) if path.name != files.LOCK]
        assert not litter, f"{run}: left over: {litter}"
        self.count("runs compared")


def verb(command: list[str], said: str) -> None:
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = command
    libreflux()


def ended(process: ForkServerProcess) -> int | None:
    process.join(300)
    return process.exitcode


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run, but for its lock; how fast a step was, and where the run is, do not count."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del found[files.LOCK]
    found[checkpoint.METRICS] = re.sub(rb'"pictures_per_second": [^,]+, ', b"", found[checkpoint.METRICS])
    found[checkpoint.RECIPE] = found[checkpoint.RECIPE].replace(str(run).encode(), b"RUN")
    return found


def kill_lane(soak: Soak, lane: int, kills: int, chance: random.Random, whole: Path, steps: int) -> None:
    """`kills` SIGKILLs, fewer if time is up, in as many runs as that takes; the last one is finished too."""
    for number in itertools.count():
        run = soak.folder / f"killed-{lane}-{number}"
        while kills > 0 and time.monotonic() < soak.until and strike(soak, soak.start(run, steps), run, chance):
            kills -= 1
            soak.look(run)
        soak.finish(run, steps)
        soak.compare(run, whole)
        shutil.rmtree(run)
        if kills == 0 or time.monotonic() > soak.until:
            return


def strike(soak: Soak, process: ForkServerProcess, run: Path, chance: random.Random) -> bool:
    """Kills a run at a random instant, one in four while it starts; False if it was done before."""
    starting = chance.random() < 1 / 4
    delay, began = chance.uniform(0, 1 if starting else 2), time.monotonic()
    while process.exitcode is None and time.monotonic() < began + delay:
        if not starting and b"run folder" not in soak.said(run).read_bytes():
            began = time.monotonic()
        time.sleep(0.001)
    process.kill()
    if ended(process) == 0:
        return False
    assert process.exitcode == -signal.SIGKILL, soak.said(run).read_text()
    soak.count("kills", "killed while starting" if starting else "killed in training")
    return True


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    try:
        with tmpfs(folder, 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def refused(soak: Soak, run: Path, steps: int, what: str) -> bool:
    """Whether the run ended with exit code 2 and a line of what, where and the hint; False if it got through."""
    code = ended(soak.start(run, steps))
    if code == 0:
        return False
    text = soak.said(run).read_text()
    last = text.splitlines()[-1]
    assert code == 2, f"{run}: exit code {code}\n{text}"
    assert "Traceback" not in text, f"{run}: exit code {code}\n{text}"
    assert last.startswith(f"libreflux: error: {run}"), last
    assert what in last, last
    assert "; hint: " in last, last
    return True


def bad_disk(soak: Soak, number: int, size: int, whole: Path, steps: int) -> None:
    """A run on a disk of `size` bytes; then there is room, but no right to write; then both."""
    disk = soak.folder / f"disk-{number}"
    with tmpfs(disk, size):
        run = disk / "run"
        if refused(soak, run, steps, "No space left on device"):
            soak.count("disks full")
            soak.look(run)
        remount(disk, f"ro,size={1 << 28}")
        assert refused(soak, run, steps, "Read-only file system")
        soak.count("disks read-only")
        remount(disk, "rw")
        soak.finish(run, steps)
        soak.compare(run, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (default 50)")
    parser.add_argument("--disks", type=int, default=4, help="sizes of small disks (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and sizes (default 0)")
    parser.add_argument("--steps", type=int, default=200, help="of each killed run (default 200)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="kill no longer than that, but finish the runs")
    asked = parser.parse_args()
    began = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory(prefix="libreflux-soak-") as name, ThreadPoolExecutor(LANES) as pool:
        soak = Soak(Path(name))
        wholes = {steps: soak.folder / f"whole-{steps}" for steps in (50, asked.steps)}
        soak.finish(wholes[50], 50)  # makes the cache that all of them share
        jobs = []
        if asked.kills:
            soak.finish(wholes[asked.steps], asked.steps)
            soak.until = time.monotonic() + asked.seconds
            for lane in range(LANES):
                share, chance = len(range(lane, asked.kills, LANES)), random.Random(f"{asked.seed}/{lane}")
                jobs.append(pool.submit(kill_lane, soak, lane, share, chance, wholes[asked.steps], asked.steps))
        if asked.disks and not can_mount(soak.folder / "probe"):
            print("no right to mount a tmpfs: full and read-only disks are left out")
        elif asked.disks:
            need = sum(path.stat().st_size for path in wholes[50].rglob("*") if path.is_file())
            sizes = random.Random(f"{asked.seed}/disks")
            for number in range(asked.disks):
                size = 1 << 14 | int(need * (number + sizes.random()) / asked.disks)  # of 0 bytes would be without end
                jobs.append(pool.submit(bad_disk, soak, number, size, wholes[50], 50))
        for job in jobs:
            job.result()
    for what, count in sorted(soak.counts.items()):
        print(f"{count:4d} {what}")
    print(f"{soak.most_lost:4d} steps lost at most, of {EVERY} between two checkpoints")
    print(f"nothing unloadable, every byte as undisturbed, nothing left over; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

"""Real `libreflux train` processes, each broken at another operation on its files.

    python fork_faults.py RECIPE.yaml OUT FAULT...      prints what became of each run as JSON

The base and its data are opened once; each run is then a fork that goes on from a copy of one with a step done and
saved. A point is an operation that changes the run folder: a file opened for writing or saved, a rename, a removal, a
folder made, an fsync. For each point and FAULT the run is broken there, what it left is looked at, and after "kill" the
same command runs again.

    kill    SIGKILL just before the operation
    tear    from there on a write past the 16th byte of a file kills the process (RLIMIT_FSIZE): it stays half-written
    full    from there on the disk is full: writes go to /dev/full, whatever makes a name or syncs gets ENOSPC
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import libreflux.workflows.next_steps
import libreflux.workflows.run_record  # noqa: F401 (both imported here, once, instead of in every child)
from libreflux import files
from libreflux.cli import main
from libreflux.cli.app import command_line
from libreflux.errors import RunError
from libreflux.recipe import load_recipe
from libreflux.training import checkpoint, loop, saving
from libreflux.training.callbacks import Callbacks
from libreflux.training.ranks import Ranks

MAKES_NAMES = ("os.mkdir", "os.rename")
REMOVES = ("os.remove", "os.rmdir")


class Points:
    """Counts the operations that change a folder, and strikes at one of them; None: never, but checks their order."""

    def __init__(self, folder: Path, point: int | None, strike: Callable[[], None]) -> None:
        self.folder, self.point, self.strike = str(folder), point, strike
        self.count, self.full, self.inside = 0, False, False
        self.seen: list[str] = []
        self.order = Order()

    def watch(self) -> None:
        self.dev_full = os.open("/dev/full", os.O_WRONLY)
        self.real_open, self.real_fsync, self.real_save = io.open, os.fsync, safetensors.torch.save_file
        io.open = builtins.open = self.open  # type: ignore[assignment]
        os.fsync = self.fsync  # type: ignore[assignment]
        safetensors.torch.save_file = self.save
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in MAKES_NAMES or event in REMOVES or event == "open":
            flags = args[2] if event == "open" else 0
            if event == "open" and not flags & (os.O_WRONLY | os.O_RDWR):
                return
            inner = event in REMOVES and args[-1] != -1  # shutil.rmtree names files relative to an open folder
            if inner or any(str(arg).startswith(self.folder) for arg in args[:2]):
                self.passes(event, *map(str, args[:2]))
                if self.full and (event in MAKES_NAMES or (event == "open" and args[1] is None)):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    def passes(self, event: str, *names: str) -> None:
        if self.inside:
            return
        self.inside = True
        self.count += 1
        self.seen.append(f"{event} {Path(names[0]).name}")
        self.order.note(event, *names)
        if self.count == self.point:
            self.strike()
        self.inside = False

    def open(self, name: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = self.real_open(name, mode, *args, **options)
        if self.full and str(name).startswith(self.folder) and mode[0] in "wax":
            os.dup2(self.dev_full, file.fileno())
        return file

    def fsync(self, handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.startswith(self.folder):
            self.passes("fsync", name)
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the real one names no file either

    def save(self, tensors: Any, name: Any, **options: Any) -> None:
        self.passes("save_file", str(name))
        if self.full:
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        self.real_save(tensors, name, **options)

    def fill_disk(self) -> None:
        self.full = True
        for handle in os.listdir("/proc/self/fd"):
            try:
                name = os.readlink(f"/proc/self/fd/{handle}")
            except FileNotFoundError:  # the listing's own
                continue
            if name.startswith(self.folder) and name.endswith(checkpoint.METRICS):
                os.dup2(self.dev_full, int(handle))


class Order:
    """What a power cut asks for: bytes are synced before they get their name, and the name's folder right after."""

    def __init__(self) -> None:
        self.unsynced: set[str] = set()
        self.named: list[str] = []
        self.faults: list[str] = []

    def note(self, event: str, name: str, new: str = "") -> None:
        if event == "fsync":
            self.unsynced.discard(name)
            self.named = [folder for folder in self.named if folder != name]
            return
        if self.named:
            self.faults.append(f"{event} {name} before {self.named} was synced")
            self.named = []
        if event in ("open", "save_file"):
            self.unsynced.add(name)
        if event == "os.rename" and not Path(new).name.startswith("."):
            below = [each for each in self.unsynced if each == name or each.startswith(f"{name}/")]
            self.faults += [f"{each} was not synced before it became {new}" for each in below]
            self.named = [str(Path(new).parent)]


def strike(fault: str, points: Points) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "tear":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
    else:
        points.fill_disk()


def train(command: list[str], run: Path, fault: str = "", point: int | None = None) -> dict[str, Any]:
    """One process: its exit code or minus its signal, what it said last, and what it did to its files."""
    reading, pipe = os.pipe()
    process = os.fork()
    if process == 0:
        with open(os.devnull if fault == "tear" else run.with_suffix(".err"), "wb") as said:
            os.dup2(said.fileno(), 2)
        code = 1
        try:
            sys.argv = ["libreflux", "train", *command, f"out={run}"]
            points = Points(run, point, lambda: strike(fault, points))
            points.watch()
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
            os.write(pipe, json.dumps({"points": points.seen, "order": points.order.faults}).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(pipe)
    with open(reading, encoding="utf-8") as told:
        result: dict[str, Any] = json.loads(told.read() or "{}")
    result["code"] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    errors = run.with_suffix(".err")
    result["said"] = errors.read_text(encoding="utf-8").splitlines()[-1:] if errors.exists() else []
    return result


def left(run: Path) -> dict[str, Any]:
    """What a broken run left: its newest checkpoint, finished steps after that, what cannot be loaded."""
    found = checkpoint.listed(run)
    unloadable = []
    for folder in (one.path for one in found):
        try:
            files.verify_manifest(folder)
        except RunError as error:
            unloadable.append(str(error))
    metrics = run / checkpoint.METRICS
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    step = found[-1].step if found else 0
    return {"step": step, "lost": steps - step, "unloadable": unloadable}


def run_all(recipe: Path, out: Path, faults: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    resolved = load_recipe(recipe, [f"out={out / 'open'}"])
    opened = loop.open_for_training(resolved, out / "open", None, Callbacks(), Ranks(), "cpu")

    def reopen(recipe: Any, run: Path, newest: Any, *_: Any) -> Any:
        training = dataclasses.replace(opened, recipe=recipe, run=run)
        if newest is not None:
            saving.restore(training, newest, fork=False)
        return training

    loop.open_for_training = reopen  # type: ignore[assignment]
    command_line()
    gc.collect()
    gc.freeze()  # children need not look through all that was imported
    first = train([str(recipe), "steps=1"], out / "first")
    shutil.copytree(out / "first", out / "whole")
    whole = train([str(recipe)], out / "whole")
    broken = []
    for fault in faults:
        for point, name in enumerate(whole["points"], 1):
            if fault == "tear" and not name.startswith(("open", "save_file")):
                continue
            run = out / f"{fault}-{point}"
            shutil.copytree(out / "first", run)
            result = train([str(recipe)], run, fault, point)
            result |= {"run": run.name, "point": f"{fault} at {name}", "left": left(run)}
            if fault == "kill":
                result["again"] = train([str(recipe)], run)
            else:
                with files.lock(run):
                    checkpoint.recover(run)
            broken.append(result)
    gc.unfreeze()  # or libraries complain at the end of what was never freed
    return {"first": first, "whole": whole, "broken": broken}


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))

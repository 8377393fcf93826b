"""Real training processes that are really killed: imports everything once, then forks one process per run.

    python fork_runs.py RUNS.json      prints what became of each run as JSON

A run is {"recipe": {…}, "moment": null or {…}}, one after another. At its moment the process stops and is sent SIGKILL:
    {"event": "os.rename", "match": "regex", "nth": 1}   before the nth such file operation, seen by Python's audit hook
    {"backward": 4}                                      in the backward pass of step 4
    {"seconds": 0.3}                                     that long after training began
    {"signal": "SIGTERM", "step": 3}                     not killed: that signal arrives during step 3's callback
With "rival": true a second process tries the same run folder while the first one stands at its moment; with
"fork": true the recipe may have changed.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from libreflux.errors import LibrefluxError
from libreflux.recipe import Recipe
from libreflux.training.callbacks import Callbacks, Started, StepInfo
from libreflux.training.interrupt import Interrupted
from libreflux.training.loop import fit


class Teller(Callbacks):
    """Tells the parent when training starts, and stands still at the moment."""

    def __init__(self, moment: dict[str, Any], tell: Callable[[bytes], object]) -> None:
        self.moment, self.tell, self.step, self.hooked = moment, tell, 0, False

    def stand(self) -> None:
        self.tell(b"held\n")
        time.sleep(600)

    def watch(self, event: str, args: tuple[Any, ...]) -> None:
        if event == self.moment["event"] and any(re.search(self.moment["match"], str(arg)) for arg in args):
            self.moment["nth"] -= 1
            if self.moment["nth"] == 0:
                self.stand()

    def on_start(self, started: Started) -> None:
        self.step = started.step
        self.tell(b"started\n")

    def on_step(self, info: StepInfo) -> None:
        self.step = info.step
        if "signal" in self.moment and info.step == self.moment["step"]:
            os.kill(os.getpid(), getattr(signal, self.moment["signal"]))

    def on_sample(self, step: int, transformer: Any) -> None:
        if "backward" in self.moment and not self.hooked:
            self.hooked = True
            transformer.proj_out.register_full_backward_hook(self.in_backward)

    def in_backward(self, *_: object) -> None:
        if self.step + 1 == self.moment["backward"]:
            self.stand()


def child(recipe: dict[str, Any], moment: dict[str, Any], pipe: int, forked: bool) -> int:
    teller = Teller(moment, lambda line: os.write(pipe, line))
    if "event" in moment:
        sys.addaudithook(teller.watch)
    try:
        fit(Recipe.model_validate(recipe), teller, fork=forked)
    except Interrupted as stopped:
        return stopped.exit_code
    except LibrefluxError as error:
        os.write(pipe, f"error {error}\n".encode())
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(recipe: dict[str, Any], moment: dict[str, Any], forked: bool) -> tuple[int, int]:
    """(process id, reading end of its pipe)."""
    reading, pipe = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        code = 1
        try:
            code = child(recipe, moment, pipe, forked)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(pipe)
    return process, reading


def one(recipe: dict[str, Any], moment: dict[str, Any], rival: bool, forked: bool = False) -> dict[str, Any]:
    process, reading = fork(recipe, moment, forked)
    result: dict[str, Any] = {"errors": []}
    with open(reading, encoding="utf-8") as lines:
        for line in lines:
            if line == "held\n":
                if rival:
                    result["rival"] = one(recipe, {}, rival=False)
                    result["pid"] = process
                os.kill(process, signal.SIGKILL)
            elif line == "started\n" and "seconds" in moment:
                time.sleep(moment["seconds"])
                os.kill(process, signal.SIGKILL)
            elif line.startswith("error "):
                result["errors"].append(line.removeprefix("error ").rstrip("\n"))
    result["code"] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return result


def main(path: Path) -> None:
    Image.init()  # loads the plug-ins of Pillow here, once, instead of in every child
    runs = json.loads(path.read_text(encoding="utf-8"))
    gc.collect()
    gc.freeze()  # children need not look through all that was imported
    results = [
        one(run["recipe"], dict(run["moment"] or {}), run.get("rival", False), run.get("fork", False)) for run in runs
    ]
    gc.unfreeze()  # or libraries complain at the end of what was never freed
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

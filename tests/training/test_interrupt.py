"""Signals: a run ends its step and saves, a verb leaves nothing half-written, and a lost terminal hinders neither."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from libreflux.recipe import Recipe
from libreflux.training import checkpoint
from libreflux.training.callbacks import Callbacks, StepInfo
from libreflux.training.interrupt import SIGNALS, Interrupted, StopRequest
from libreflux.training.loop import fit

SAVES = """
import sys, time
from libreflux.training.interrupt import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for _ in range(3000):
        if stop.signum:
            break
        time.sleep(0.01)
    print("to a terminal that may be gone", flush=True)
    print("likewise", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(str(int(stop.signum)))
"""
WRITES = """
import importlib, sys, time
from pathlib import Path
from libreflux.files import replace_whole, staged_dir
def verb(**_):
    with staged_dir(Path(sys.argv[1])) as folder:
        (folder / "half").write_text("half")
        def fill(temporary):
            temporary.write_text("half")
            print("ready", flush=True)
            time.sleep(60)
        replace_whole(Path(sys.argv[1]).with_name("file"), fill)
module = importlib.import_module("libreflux.cli.app")
module.command_line = lambda: verb
module.main()
"""


@pytest.fixture(autouse=True)
def not_ignored() -> Iterator[None]:
    """Whoever runs the tests may be under nohup, or in the background."""
    plain: dict[signal.Signals, Any] = {
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {signum: signal.signal(signum, handler) for signum, handler in plain.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", SIGNALS)
def test_each_signal_saves_the_step(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path, signum: signal.Signals
) -> None:
    class Signalled(Callbacks):
        def on_step(self, info: StepInfo) -> None:
            os.kill(os.getpid(), signum)

    recipe = Recipe.model_validate(recipe_tree(tmp_path / "run", steps=3, save={"every": 100}))
    with pytest.raises(Interrupted, match=f"stopped by {signum.name} after step 1, saved") as stop:
        fit(recipe, Signalled())
    assert stop.value.exit_code == 128 + signum
    assert [one.step for one in checkpoint.listed(tmp_path / "run")] == [1]


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_ignored(signum: signal.Signals) -> None:
    """As nohup does with SIGHUP, and a shell with SIGINT for what it starts in the background of a script."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signum)
            assert stop.signum is None
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_terminal_that_hangs_up_costs_nothing(tmp_path: Path) -> None:
    """The kernel's own SIGHUP, to the leader of the session whose terminal is closed, as when ssh is lost."""
    master, slave = pty.openpty()
    command = [sys.executable, "-c", SAVES, str(tmp_path / "saved")]
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # takes it as its controlling terminal
    )
    os.close(slave)
    assert os.read(master, 5) == b"ready"
    os.close(master)
    assert process.wait(30) == 0
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))


PRINTS = """
import sys, time
from libreflux.cli.progress import progress
from libreflux.printing import get_logger, never_fail, say
never_fail()
say("ready")
sys.stdin.readline()  # until the terminal is gone
with progress("training") as report:
    for step in range(3):
        report(step + 1, 3)
        say("step", err=True)
        print("done")
get_logger("libreflux.x").warning("told")
open(sys.argv[1], "w").write("saved")
"""


def test_a_terminal_that_refuses_what_is_written_costs_nothing(tmp_path: Path) -> None:
    """Lost without a SIGHUP, as one that is not the controlling terminal, or before it arrives: a write is an EIO."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS, str(tmp_path / "saved")],
        stdin=subprocess.PIPE,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    ) as process:
        os.close(slave)
        assert os.read(master, 5) == b"ready"
        os.close(master)
        process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_verb_that_is_ended_leaves_nothing_half_written(tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "-c", WRITES, str(tmp_path / "folder")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert len(list(tmp_path.iterdir())) == 3  # a file, a folder and its lock
    process.send_signal(signum)
    assert process.wait(30) in (128 + signum, -signum)
    assert list(tmp_path.iterdir()) == []

"""What takes long says so while it does, and how long it took; what is quick says nothing."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from libreflux.cli import progress


def test_only_what_takes_long_is_told() -> None:
    said = io.StringIO()
    console = Console(file=said)
    with progress.announced("reading", after=60, console=console):
        pass
    assert said.getvalue() == ""
    with progress.announced("reading", after=0, console=console):
        while not said.getvalue():
            threading.Event().wait(0.01)
        assert said.getvalue() == "reading …\n"
    assert said.getvalue().splitlines()[1].startswith("reading: took 0:0")


def test_a_failure_is_not_told_as_done() -> None:
    said = io.StringIO()

    def fail() -> None:
        with progress.announced("reading", after=0, console=Console(file=said)):
            while not said.getvalue():
                threading.Event().wait(0.01)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert said.getvalue() == "reading …\n"

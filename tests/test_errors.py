"""Errors cross from a worker process to the one that started it, where pickle copies them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libreflux.errors import OptionError, OptionHint, RunError
from libreflux.training.interrupt import Interrupted


@pytest.mark.parametrize("way", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize(
    "error",
    [
        RunError("is full", where=Path("run"), hint="make room"),
        OptionError("cannot be 3", "offload", value="model", hint=OptionHint("use `device` cpu")),
        Interrupted(2, 7, Path("run")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_copy_of_an_error_says_the_same(error: Exception, way: Callable[[Any], Any]) -> None:
    made = way(error)
    assert type(made) is type(error)
    assert str(made) == str(error)
    assert vars(made) == vars(error)

"""Whether blocks are compiled: a decision by what it costs and saves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from libreflux.errors import RunError
from libreflux.model.compile_choice import CompileChoice, Work, choose

TRAINING = Work(kinds=2, blocks=57, passes=20_000, training=True)
SHORT = dataclasses.replace(TRAINING, passes=100)
DRAWING = Work(kinds=2, blocks=57, passes=56, training=False)


@pytest.mark.parametrize(
    ("asked", "device", "work", "missing", "before", "on"),
    [
        ("auto", "cuda", TRAINING, None, None, True),
        ("auto", "cuda", SHORT, None, None, False),  # would save less than it takes
        ("auto", "cuda", dataclasses.replace(TRAINING, kinds=40), None, None, True),
        ("auto", "cuda", dataclasses.replace(SHORT, passes=2_000, kinds=40), None, None, False),  # 40 kinds take long
        ("auto", "cuda", DRAWING, None, None, False),
        ("auto", "cuda", dataclasses.replace(DRAWING, passes=5_000), None, None, True),
        ("auto", "cpu", TRAINING, None, None, False),
        ("auto", "mps", TRAINING, None, None, False),
        ("auto", "cuda", TRAINING, "no Triton", None, False),
        ("auto", "cuda", TRAINING, None, False, False),  # begun without
        ("auto", "cuda", SHORT, None, True, True),  # begun with
        ("auto", "cpu", SHORT, None, True, True),
        ("auto", "cuda", SHORT, "no Triton", True, False),
        ("on", "cpu", SHORT, None, None, True),
        ("on", "cuda", SHORT, None, False, True),
        ("off", "cuda", TRAINING, None, True, False),
        ("off", "cuda", TRAINING, "no Triton", None, False),
    ],
)
def test_compiles_where_asked_or_where_it_pays(
    asked: Any, device: str, work: Work, missing: str | None, before: bool | None, on: bool
) -> None:
    assert choose(asked, device, work, missing=missing, before=before).on is on


def test_what_is_told() -> None:
    assert choose("auto", "cuda", TRAINING).told == (
        "blocks are compiled: about 120 s to compile, and 7,980 s saved in 20,000 passes (estimated)"
    )
    assert choose("auto", "cuda", SHORT).told == (
        "blocks are not compiled: about 120 s to compile, and 40 s saved in 100 passes (estimated)"
    )
    assert choose("auto", "cpu", TRAINING) == CompileChoice(False)  # as ever: nothing to say
    assert choose("auto", "cuda", TRAINING, before=False).told == "blocks are not compiled, as they were before"
    assert choose("auto", "cuda", TRAINING, missing="no Triton").told == "blocks are not compiled: no Triton"
    assert choose("auto", "cuda", SHORT, missing="no Triton").told is None  # it would not be compiled anyway


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(RunError, match=r"^compile: no Triton; hint: set `compile` off$"):
        choose("on", "cuda", TRAINING, missing="no Triton")

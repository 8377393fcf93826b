"""Before a training run on CUDA attention's gradients are checked, at the start and when it resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from libreflux.errors import RunError
from libreflux.model import attention
from libreflux.recipe import Recipe
from libreflux.training import loop
from libreflux.training.callbacks import Callbacks
from tiny import tiny_transformer

Tree = Callable[..., dict[str, Any]]


class Heard(Callbacks):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []

    def on_notice(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        self.stages.append(doing)
        yield


def taken_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    check = loop.check_attention
    monkeypatch.setattr(loop, "check_attention", lambda net, batches, _, heard: check(net, batches, "cuda:0", heard))


def test_it_is_checked_at_the_start_and_on_resuming(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is a CPU here, which this check alone takes for a card."""
    asked: list[dict[str, Any]] = []
    real = attention.check_gradients

    def on_the_cpu(**options: Any) -> float:
        asked.append(options)
        return real(**options | {"device": "cpu"})

    monkeypatch.setattr(attention, "check_gradients", on_the_cpu)
    taken_for_a_card(monkeypatch)
    heard = Heard()
    for steps in (2, 4):
        loop.fit(Recipe.model_validate(recipe_tree(tmp_path / "run", steps=steps)), heard)
    # Pictures of 32 px are 4 tokens; captions have from 1 token, of the empty prompt, up to the longest's.
    shortest, longest = asked[0]["lengths"][0], asked[0]["lengths"][-1]
    assert asked == [{"head_dim": 16, "dtype": torch.float32, "lengths": asked[0]["lengths"], "device": "cuda:0"}] * 2
    assert shortest == 4 + 1
    assert longest >= 4 + 8
    assert {7, 64} <= {length % 128 for length in asked[0]["lengths"]}
    assert len(heard.lines) == 2
    assert all("agree with the plain formula" in line for line in heard.lines)
    assert "checking attention's gradients" in heard.stages


def test_wrong_gradients_end_the_run_before_its_first_step(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(**options: Any) -> float:
        raise RunError("the gradient of attention's keys is not finite here", where="device cuda:0")

    monkeypatch.setattr(attention, "check_gradients", wrong)
    taken_for_a_card(monkeypatch)
    with pytest.raises(RunError, match="not finite"):
        loop.fit(Recipe.model_validate(recipe_tree(tmp_path / "run")))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cpu_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "check_gradients", lambda **options: pytest.fail("was checked"))
    loop.check_attention(tiny_transformer(), None, "cpu", Callbacks())  # type: ignore[arg-type]

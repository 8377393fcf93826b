"""Averages that are taken in beside a card's work, by a stand-in for the card: the same bits as at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from libreflux.recipe import Recipe
from libreflux.training import ema, host_copies
from libreflux.training.ema import Averages
from libreflux.training.host_copies import CudaLane, Lane, lane_for
from libreflux.training.loop import fit


class LateLane:
    """A card that copies as late as it may: when the next change is held back for it, or a while after the asking."""

    pinned = False

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.lock, self.held, self.made = threading.Lock(), threading.Event(), 0

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.held.clear()
        self.pairs = list(pairs)

    def hold(self) -> None:
        self._copy()
        self.held.set()

    def wait(self) -> None:
        self.held.wait(0.2)
        self._copy()

    def _copy(self) -> None:
        with self.lock, torch.no_grad():
            for target, source in self.pairs:
                target.copy_(source)
            self.made += bool(self.pairs)
            self.pairs = []


def walked(
    lane: Lane | None, *, held: bool = True, steps: int = 12, every: int = 1
) -> tuple[Averages, dict[str, Tensor]]:
    """Averages of a random walk, whose next step comes right after each update."""
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(3, 5, generator=generator).bfloat16(), "b": torch.randn(7, generator=generator)}
    weights["c"] = torch.randn((), generator=generator)
    averages = Averages(weights, [0.05, 0.25], every, lane)
    for step in range(1, steps + 1):
        if held:
            averages.before_change()
        for tensor in weights.values():
            tensor += torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        averages.update(step)
    if held:
        averages.before_change()
    for tensor in weights.values():
        tensor.zero_()
    return averages, averages.tensors()


@pytest.mark.parametrize("every", [1, 5])
def test_the_overlapped_way_gives_the_same_bits(every: int) -> None:
    lane = LateLane()
    (direct, expected), (averages, found) = walked(None, every=every), walked(lane, every=every)
    assert found.keys() == expected.keys()
    assert len(found) == 6
    assert all(tensor.equal(expected[key]) for key, tensor in found.items())
    assert lane.made == 12 // every
    assert averages.step == direct.step == 12 - 12 % every


def test_a_change_that_does_not_wait_would_be_seen() -> None:
    """The stand-in is as late as a card can be."""
    (_, expected), (_, found) = walked(None, steps=2), walked(LateLane(), steps=2, held=False)
    assert not any(tensor.equal(expected[key]) for key, tensor in found.items())


def test_a_run_has_the_same_averages_either_way(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = {"kind": "adamw_bf16", "learning_rate": 1e-2}
    files = {}
    for name, lane in (("direct", None), ("overlapped", LateLane())):
        monkeypatch.setattr(ema, "lane_for", lambda tensors, lane=lane: lane)
        fit(Recipe.model_validate(recipe_tree(tmp_path / name, steps=4, optimizer=optimizer)))
        files[name] = (tmp_path / name / "checkpoints/step-00000004/ema.safetensors").read_bytes()
    assert lane is not None
    assert lane.made == 4
    assert files["direct"] == files["overlapped"]


@pytest.mark.parametrize("call", ["update", "tensors", "load"])
def test_an_error_of_the_worker_is_raised_by_the_next_call(call: str) -> None:
    class Broken(LateLane):
        def wait(self) -> None:
            raise MemoryError("no room for it")

    averages = Averages({"x": torch.ones(2)}, [0.1], 1, Broken())
    averages.update(1)
    calls = {"update": lambda: averages.update(2), "tensors": averages.tensors, "load": lambda: averages.load({}, 1)}
    with pytest.raises(MemoryError, match="no room for it"):
        calls[call]()


def test_only_tensors_of_one_card_are_copied_beside_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies, "CudaLane", lambda device: device)

    class OnCard:
        device = torch.device("cuda:1")

    card: Any = OnCard()
    assert lane_for([card, card]) == torch.device("cuda:1")
    assert lane_for([card, torch.ones(1)]) is lane_for([torch.ones(1)]) is lane_for([]) is None


def test_a_card_copies_after_its_step_and_steps_after_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append((self.name, "waits for", other.name))

        def wait_event(self, event: Event) -> None:
            told.append((self.name, "waits for", event.at))

    class Event:
        at: str

        def record(self, stream: Stream) -> None:
            self.at = f"copies on {stream.name}"

        def synchronize(self) -> None:
            told.append(("the host waits for", self.at))

    class Copied:
        def copy_(self, source: str, non_blocking: bool) -> None:
            told.append(("copy", source, non_blocking, inside[-1]))

    inside: list[Any] = []

    @contextlib.contextmanager
    def entered(what: Any) -> Iterator[None]:
        inside.append(getattr(what, "name", what))
        yield
        inside.pop()

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "device", entered)
    lane = CudaLane(torch.device("cuda:1"))
    pairs: Any = [(Copied(), "a"), (Copied(), "b")]
    lane.copy(pairs)
    lane.hold()
    lane.wait()
    assert told == [
        ("side", "waits for", "main"),
        ("copy", "a", True, "side"),
        ("copy", "b", True, "side"),
        ("main", "waits for", "copies on side"),
        ("the host waits for", "copies on side"),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_memory_that_cannot_be_pinned_is_told_and_used(caplog: pytest.LogCaptureFixture) -> None:
    assert host_copies.host_buffer(8, True).shape == (8,)
    assert "cannot be pinned" in caplog.text

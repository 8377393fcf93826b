"""A run whose base waits in RAM in part: the same bytes, a number of blocks that follows from the estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from libreflux.errors import RecipeError
from libreflux.model import offload
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.recipe import Recipe
from libreflux.training import memory_plan
from libreflux.training.callbacks import Callbacks
from libreflux.training.loop import fit
from libreflux.training.phases import CARD_RESERVE, Estimate, Phase
from libreflux.training.ranks import Ranks
from libreflux.workflows.train import train

Tree = Callable[..., dict[str, Any]]
BLOCKS = 3  # of the tiny model


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU in a card's place; what is away is NaN. Gives how many blocks waited, by run."""
    runs: list[int] = []
    own = offload.BlockOffload.__init__

    def made(self: offload.BlockOffload, transformer: torch.nn.Module, count: int, device: str) -> None:
        runs.append(count)
        own(self, transformer, count, device)

    monkeypatch.setattr(offload.BlockOffload, "__init__", made)
    monkeypatch.setattr(offload, "DEVICES", ["cuda", "cpu"])
    monkeypatch.setattr(
        offload, "at_rest", lambda home: torch.full_like(home, 101 if home.dtype == torch.int8 else torch.nan)
    )
    return runs


@pytest.fixture
def own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in memory of torch's own, as on a card: mapped from a file, at another alignment, MKL sums otherwise."""
    load = ModelSource.load_transformer

    def loaded(source: ModelSource, **options: Any) -> torch.nn.Module:
        found = load(source, **options)
        for parameter in found.parameters():
            parameter.data = parameter.data.clone()
        return found

    monkeypatch.setattr(ModelSource, "load_transformer", loaded)


class Notices(Callbacks):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_notice(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.usefixtures("own_memory")
@pytest.mark.parametrize(
    ("base", "keys"), [("fp32", {}), ("int8", {"guided_target": {"scale": 3}, "hold_base": {"weight": 0.4}})]
)
def test_a_run_has_the_same_bytes_with_all_blocks_waiting(
    recipe_tree: Tree, tmp_path: Path, stand_in: list[int], base: str, keys: dict[str, Any], share: float
) -> None:
    """Held-out measurements, sample sheets, a resume, and passes without the adapter included."""
    changes: dict[str, Any] = {
        **keys,
        "base": base,
        "gradient_checkpointing": True,
        "save": {"every": 1},
        "accumulate": 2,
        "held_out": {"share": share, "every": 1},
        "samples": {"every": 1, "at_start": True, "prompts": ["a fox"], "guidance": [3.0]},
    }
    found = []
    for name, blocks in (("plain", 0), ("waiting", BLOCKS)):
        for steps in (1, 2):
            tree = recipe_tree(tmp_path / name, **changes, steps=steps, offload_blocks=blocks)
            result = train(Recipe.model_validate(tree))
        assert result.adapter is not None
        sheets = sorted((tmp_path / name).glob("samples/*.png"))
        assert len(sheets) == 3
        measured = (tmp_path / name / "held_out.jsonl").read_bytes()
        found.append([result.adapter.read_bytes(), *(sheet.read_bytes() for sheet in sheets), measured])
    assert stand_in == [BLOCKS, BLOCKS]
    assert found[0] == found[1]


@pytest.mark.usefixtures("own_memory")
def test_auto_is_decided_at_each_start_and_told(
    recipe_tree: Tree, tmp_path: Path, stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [2**40]
    monkeypatch.setattr(memory_plan, "free_memory", lambda _: free[0])
    monkeypatch.setattr(memory_plan, "needed", lambda estimate, room: BLOCKS if room == 2**40 else 0)

    def run(**changes: Any) -> list[str]:
        notices = Notices()
        tree = recipe_tree(tmp_path / "run", gradient_checkpointing=True, offload_blocks="auto", **changes)
        fit(Recipe.model_validate(tree), notices)
        return [line for line in notices.lines if line.startswith("offload_blocks")]

    assert run(steps=2) == ["offload_blocks: auto; 3 of 3 blocks wait in RAM (1,024.0 GiB are free)"]
    free[0] = 2**41  # another card
    assert run(steps=3) == ["offload_blocks: auto; 0 of 3 blocks wait in RAM (2,048.0 GiB are free)"]
    assert stand_in == [BLOCKS]
    tree = recipe_tree(tmp_path / "run", gradient_checkpointing=True, steps=4)
    found = fit(Recipe.model_validate(tree))  # without it: the bits are the same, so no fork is asked for
    plain = fit(Recipe.model_validate(tree | {"out": str(tmp_path / "plain")}))
    assert found.read_bytes() == plain.read_bytes()


def test_auto_on_a_cpu_is_none(recipe_tree: Tree, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe = Recipe.model_validate(recipe_tree(tmp_path, gradient_checkpointing=True, offload_blocks="auto"))
    notices = Notices()
    assert memory_plan.plan_memory(recipe, open_model(tiny_model_dir), "cpu", Ranks(), notices).waiting == 0
    assert notices.lines == ["offload_blocks: auto; 0 of 3 blocks wait in RAM (of no use on cpu)"]


def test_what_does_nothing_is_refused(recipe_tree: Tree, tmp_path: Path, stand_in: list[int]) -> None:
    with pytest.raises(ValueError, match="offload_blocks needs gradient_checkpointing: true"):
        Recipe.model_validate(recipe_tree(tmp_path, offload_blocks=3))
    for count, told in ((2, "2 would save nothing"), (4, "4 cannot wait, the model has 3 blocks")):
        tree = recipe_tree(tmp_path / "run", offload_blocks=count, gradient_checkpointing=True)
        with pytest.raises(RecipeError, match=told):
            fit(Recipe.model_validate(tree))
    offload.DEVICES.remove("cpu")
    tree = recipe_tree(tmp_path / "run", offload_blocks=3, gradient_checkpointing=True)
    with pytest.raises(RecipeError, match=r"^offload_blocks: is of no use on cpu"):
        fit(Recipe.model_validate(tree))
    assert not stand_in


def an_estimate(**changes: Any) -> Estimate:
    rest = dict.fromkeys(("adapter", "moments", "gradient", "update", "averages", "checkpoint"), 0)
    drawing = Phase(name="drawing samples", held=700, activations=0, libraries=0)
    blocks = [(100,)] * 5
    own: dict[str, Any] = {"on_cpu": False, "weights": 600, "activations": 0, "between": (drawing,), "blocks": blocks}
    return Estimate(**rest | own | changes)


def test_the_estimate_counts_what_waits() -> None:
    whole = an_estimate()
    assert whole.offloaded(0) == whole
    fewer = whole.offloaded(4)
    assert (fewer.weights, fewer.between[0].held, fewer.host) == (400, 500, 1024)
    assert fewer.training.peak == whole.training.peak - 200
    assert fewer.offloaded(0) == whole
    assert "base weights, 4 of 5 blocks in RAM" in fewer.table()
    assert "CPU memory beside it: averages, blocks" in fewer.table()
    assert "blocks" not in whole.table()


def test_as_few_blocks_wait_as_the_card_asks_for() -> None:
    whole = an_estimate()
    peaks = {count: whole.offloaded(count).largest.peak for count in (0, 3, 4, 5)}
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for count, peak in peaks.items():
        assert memory_plan.needed(whole, CARD_RESERVE * peak) == count
    assert memory_plan.needed(whole, CARD_RESERVE * peaks[3] - 1) == 4
    assert memory_plan.needed(whole, 0) == 5  # nothing helps, and the memory verdict says so
    assert memory_plan.needed(dataclasses.replace(whole, blocks=[(100,)] * 2), 0) == 0
    assert memory_plan.needed(an_estimate(on_cpu=True), 0) == 0
    preparing = Phase(name="preparing", held=10**9, activations=0, libraries=0)  # before the base is there
    assert memory_plan.needed(dataclasses.replace(whole, preparing=(preparing,)), CARD_RESERVE * peaks[0]) == 0

"""The first steps of training on the card beside the CPU's, and a run that was killed there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpu.alone import DEVICE, alone, killed
from gpu.recipes import tree

# Every pair of values once. Base and optimizer decide the dtypes, the kind the products.
RUNS = [
    ("lokr", "bf16", "adamw"),
    ("lokr", "int8", "adamw_bf16"),
    ("lora", "bf16", "adamw_bf16"),
    ("lora", "int8", "adamw"),
]


@pytest.mark.parametrize("layout", ["emoji", "tiny"])
@pytest.mark.parametrize(("kind", "base", "optimizer"), RUNS)
def test_the_first_steps_are_the_cpus_and_the_loss_falls(
    layout: str, kind: str, base: str, optimizer: str, places: dict[str, Path]
) -> None:
    recipe = tree(layout, kind, base, optimizer, places)
    found = alone("training.beside_the_cpu", recipe=recipe, steps=2)
    there, here = found["there"]["rows"], found["here"]["rows"]
    assert [row["step"] for row in there] == list(range(1, recipe["steps"] + 1))
    assert all(math.isfinite(row["loss"]) for row in there)
    assert [row["data"] for row in there[:2]] == [row["data"] for row in here]  # pictures, noise levels, noise
    for row, expected, tolerance in zip(there, here, (0.01, 0.03), strict=False):  # the second is after an update
        assert row["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    before, after = found["there"]["held_out"]
    assert after < 0.99 * before


def _rows(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    text = Path(f"{recipe['out']}.seen").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("layout", "kind", "base", "optimizer", "deterministic"),
    [("tiny", "lora", "bf16", "adamw", False), ("emoji", "lokr", "int8", "adamw_bf16", True)],
)
def test_a_killed_run_ends_like_one_that_was_not(
    layout: str, kind: str, base: str, optimizer: str, deterministic: bool, places: dict[str, Path]
) -> None:
    steps, every, end = 16, 4, "checkpoints/step-00000016"
    changes = {"steps": steps, "save": {"every": every, "keep": 100}, "device": DEVICE, "batch": 2}
    changes |= {"deterministic": deterministic, "held_out": {}}
    outs = [places["out"].parent / name for name in ("whole", "killed")]
    recipe, other = (  # at a small rate: what differs does not grow
        tree(layout, kind, base, optimizer, {**places, "out": out}, rate=1e-3, **changes) for out in outs
    )
    alone("training.run", recipe=recipe)
    killed("training.run", Path(other["out"]) / "checkpoints" / "step-00000004", recipe=other)
    assert not (Path(other["out"]) / "adapter.safetensors").exists()
    alone("training.run", recipe=other)

    whole, resumed = _rows(recipe), _rows(other)
    assert len(whole) == steps <= len(resumed) < steps + 2 * every  # what was not saved is done again
    assert {row["step"] for row in resumed} == set(range(1, steps + 1))
    for row in resumed:
        expected = whole[row["step"] - 1]
        assert row["data"] == expected["data"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=0 if deterministic else 0.02)
    a, b = Path(recipe["out"]), Path(other["out"])
    assert (a / end / "state.json").read_bytes() == (b / end / "state.json").read_bytes()
    if deterministic:
        names = {file.name for file in (a / end).iterdir()}
        assert names == {file.name for file in (b / end).iterdir()}
        assert len(names) >= 5  # the averages among them
        for name in names:
            assert (a / end / name).read_bytes() == (b / end / name).read_bytes(), name
        return
    began = load_file(a / "checkpoints/step-00000004/adapter.safetensors")
    ended, again = load_file(a / "adapter.safetensors"), load_file(b / "adapter.safetensors")
    moved = _distance(ended, began)
    assert moved > 0
    assert _distance(ended, again) < 0.1 * moved  # a bound that no card has been asked for yet


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(torch.stack([(one[name].double() - other[name].double()).norm() for name in one]).norm())


def test_averages_beside_the_cards_work_have_the_bits_of_those_at_once() -> None:
    assert alone("averages.overlapped_is_direct")

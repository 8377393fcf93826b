"""Several processes: on two cards they end like one, and more processes than cards are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpu.alone import DEVICE, Done, process
from gpu.recipes import tree

CARDS = torch.cuda.device_count()


def _train(recipe: dict[str, Any], processes: int) -> Done:
    path = Path(recipe["out"]).with_suffix(".json")  # JSON is YAML
    path.write_text(json.dumps(recipe))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return process([*(launcher if processes > 1 else []), "-m", "libreflux", "train", str(path)])


@pytest.mark.skipif(CARDS < 2, reason=f"{CARDS} of the 2 cards that this needs")
def test_two_cards_are_one_with_twice_the_passes(places: dict[str, Path]) -> None:
    losses: list[list[float]] = []
    weights = []
    for processes in (2, 1):
        out = places["out"].parent / f"on-{processes}"
        changes = {"accumulate": 2 // processes, "steps": 8, "held_out": {}, "batch": 2}
        recipe = tree("tiny", "lokr", "bf16", "adamw", {**places, "out": out}, rate=1e-3, **changes)
        done = _train(recipe, processes)
        assert done.code == 0, done.log()  # with equal replicas: the run compares them before it saves
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        weights.append(load_file(out / "adapter.safetensors"))
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert weights[0].keys() == weights[1].keys()


def test_more_processes_than_cards_are_refused(places: dict[str, Path]) -> None:
    if DEVICE != "cuda":
        pytest.skip(f"{DEVICE} may be shared")
    recipe = tree("tiny", "lokr", "bf16", "adamw", places, held_out={}, steps=2)
    done = _train(recipe, CARDS + 1)
    assert done.code not in (0, None), done.log()
    refusals = [line for line in (done.out + done.err).splitlines() if "libreflux: error: " in line]
    assert refusals, done.log()
    assert any("hint: " in line and "card" in line for line in refusals), done.log()
    assert not (places["out"] / "checkpoints").exists()

"""A run that is killed again and again ends with the bytes of one that was left alone: real processes, real SIGKILL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 8
SIGKILL = -9


def _recipe(tree: Callable[..., dict[str, Any]], out: Path) -> dict[str, Any]:
    """Everything that could go wrong on resuming: bf16 rounding noise, a schedule that reads the step, accumulated and
    short steps, several crops and captions, dropout, passes without gradient or adapter, pruning."""
    source = {**tree(out)["data"][0], "caption_dropout": 0.3, "crops_per_picture": 2}
    return tree(
        out,
        data=[source],
        base="bf16",
        guided_target={"scale": 2, "decay": 1},
        hold_base={"weight": 0.2, "sigmas": [0.2, 0.9]},
        accumulate=2,
        steps=STEPS,
        optimizer={"kind": "adamw_bf16", "learning_rate": 1e-2, "warmup": 3, "schedule": "cosine"},
        ema=[0.1],
        samples={"every": 1, "at_start": True, "prompts": ["a fox"]},
        save={"every": 2, "keep": 1, "keep_every": 4, "averages_every": 2},
        cache=None,
    )


HELD: list[dict[str, Any]] = [
    {"event": "os.rename", "match": r"shards/latents", "nth": 1},  # preparing: the shard is written, not yet named
    {"backward": 2},  # in the middle of a step, nothing saved yet
    {"event": "os.rename", "match": r"\.staging-\w+/optimizer", "nth": 2},  # inside step 4's checkpoint
    {"event": "os.rename", "match": r"averages/step-00000004$", "nth": 1},  # the averages kept at that step
    {"event": "os.rename", "match": r"checkpoints/step-00000004$", "nth": 1},  # it is whole, but for its name
    {"event": "shutil.rmtree", "match": r"\.deleted-step-00000002", "nth": 1},  # while an old one is deleted
    {"backward": 6},
    {"event": "os.rename", "match": r"adapter\.safetensors\.tmp-\w+$", "nth": 3},  # the result, a step from done
]
TIMED: list[dict[str, Any]] = [{"seconds": seconds} for seconds in (0.0, 0.1, 0.25)]


def _contents(run: Path) -> dict[str, bytes]:
    """Every file of a run that must not differ, the shards of the cache included."""
    keep = {path for path in run.rglob("*") if path.is_file() and path.suffix == ".safetensors"}
    keep |= set(run.glob("checkpoints/*/*.json"))
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(keep)}


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "pictures_per_second"} for line in lines]


def test_killed_runs_end_bit_identical(
    recipe_tree: Callable[..., dict[str, Any]],
    fork_runs: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    whole, held, timed, asked = (_recipe(recipe_tree, tmp_path / name) for name in ("whole", "held", "timed", "asked"))
    signals: list[dict[str, Any]] = [{"signal": "SIGTERM", "step": 3}, {"signal": "SIGINT", "step": 5}]
    plan: list[list[dict[str, Any]]] = [
        [{"recipe": whole, "moment": None}],
        [{"recipe": held, "moment": moment, "rival": moment == HELD[1]} for moment in [*HELD, None]],
        [{"recipe": timed, "moment": moment} for moment in [*TIMED, None]],
        [{"recipe": asked, "moment": moment} for moment in [*signals, None]],
    ]
    results = iter(fork_runs([run for runs in plan for run in runs]))
    of_whole, of_held, of_timed, of_asked = ([next(results) for _ in runs] for runs in plan)

    assert [result["code"] for result in of_whole] == [0]
    assert [result["code"] for result in of_held] == [*[SIGKILL] * len(HELD), 0]
    assert all(result["code"] in (SIGKILL, 0) for result in of_timed)
    assert of_timed[0]["code"] == SIGKILL
    assert of_timed[-1]["code"] == 0
    assert [result["code"] for result in of_asked] == [143, 130, 0]

    rival = of_held[1]["rival"]  # a second process on the same folder was refused at once, by name of the first
    assert rival["code"] == 2
    assert f"in use by process {of_held[1]['pid']}" in rival["errors"][0]

    expected = _contents(tmp_path / "whole")
    names = [f"checkpoints/step-0000000{step}/{file}" for step in (4, 8) for file in ("adapter", "optimizer")]
    assert {"adapter.safetensors", *(f"{name}.safetensors" for name in names)} <= set(expected)
    assert [line["step"] for line in _metrics(tmp_path / "whole")] == list(range(1, STEPS + 1))
    for run in (tmp_path / "held", tmp_path / "timed", tmp_path / "asked"):
        found = _contents(run)
        assert sorted(found) == sorted(expected), run.name
        assert [name for name in expected if found[name] != expected[name]] == [], run.name
        assert _metrics(run) == _metrics(tmp_path / "whole"), run.name
        hidden = [path.name for path in run.rglob(".*") if path.name != ".lock"]
        assert hidden == [], f"{run.name} keeps what the killed processes left"

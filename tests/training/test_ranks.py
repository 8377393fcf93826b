"""Two processes under torchrun against one: the same samples, noise levels and, but for the last bits, gradients."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
import yaml
from PIL import Image

from libreflux.adapter.io import load_adapter
from libreflux.data.order import Samples, step_plan
from libreflux.data.prepare import prepare_recipe
from libreflux.flow.sigmas import beta_cdf
from libreflux.recipe import Recipe, SigmaSpec
from libreflux.training.ranks import Ranks
from libreflux.training.step import draw_sigmas
from tiny import poison_latents


def start(folder: Path, tree: dict[str, Any], processes: int) -> subprocess.Popen[bytes]:
    recipe = folder / f"{Path(tree['out']).name}-{processes}.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "libreflux", "train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{recipe.stem}.log", "ab") as log:
        return subprocess.Popen(command, env=environment, stderr=log, stdout=log)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(300) == 0, "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))


def metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture
def tree(recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def made(name: str, **changed: Any) -> dict[str, Any]:
        common = {"base": "fp32", "steps": 20, "batch": 2, "ema": [], "samples": {"every": 0}, "device": "cpu"}
        optimizer, cache = {"kind": "adamw", "learning_rate": 1e-3}, str(tmp_path / f"{name}-cache")
        return recipe_tree(tmp_path / name, cache=cache, **{**common, "optimizer": optimizer, **changed})

    return made


def test_rank_and_sigma_are_independent() -> None:
    """Over 1,000 steps of 4 processes x 3 passes x 2 pictures every process sees every fifth of the law alike."""
    samples = Samples(np.zeros(24_000, int), lambda items, visits: np.full(len(items), 8))
    table = np.zeros((4, 5))
    for step in range(1000):
        units = step_plan(0, step, samples, 4, 2, 3)
        sigmas = draw_sigmas(SigmaSpec(), units[0].total, 0, step)
        bands = (beta_cdf(sigmas.double(), 2, 2) * 5).long().clamp(max=4)
        for unit in units:
            np.add.at(table[unit.rank], bands[list(unit.slots)].numpy(), 1)
    assert table.sum() == 24_000
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_two_processes_are_one_with_twice_the_passes(tree: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """One picture is poisoned: both runs skip the same steps. Another one is measured on the way."""
    others = tmp_path / "others"
    others.mkdir()
    Image.new("RGB", (32, 32), "red").save(others / "red.png")
    (others / "red.txt").write_text("red")
    watched = {"held_out": {"path": str(others), "every": 8}}
    samples = prepare_recipe(Recipe.model_validate(tree("one", accumulate=2, **watched)))[0].samples
    poisoned = poison_latents(tmp_path / "one-cache", 1)
    shutil.copytree(tmp_path / "one-cache", tmp_path / "two-cache")
    both = start(tmp_path, tree("two", accumulate=1, **watched), 2)
    alone = start(tmp_path, tree("one", accumulate=2, **watched), 1)
    finish(both, tmp_path)  # with equal replicas: the run compares them before it saves
    finish(alone, tmp_path)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert a.get("skipped") == b.get("skipped") in (None, poisoned)
        for name in ("loss", "gradient_norm"):
            assert a[name] is b[name] is None or a[name] == pytest.approx(b[name], rel=1e-5)
        units = step_plan(0, a["step"] - 1, samples, 2, 2, 1)
        shares = [len(unit.items) * mean for unit, mean in zip(units, a["sigma_mean"], strict=True) if unit.items]
        assert b["sigma_mean"] == [pytest.approx(sum(shares) / units[0].total, rel=1e-6)]
    assert sum("skipped" in line for line in metrics(tmp_path / "two")) == 10  # one of an epoch's two steps
    measured, expected = (metrics(tmp_path / name, "held_out.jsonl") for name in ("two", "one"))
    assert [line["step"] for line in measured] == [0, 8, 16, 20]
    for a, b in zip(measured, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    two, one = (load_adapter(tmp_path / name / "adapter.safetensors").tensors for name in ("two", "one"))
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)


def _gathered(rank: int, store: Path, value: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return Ranks(rank, 2).gather(value)
    finally:
        dist.destroy_process_group()


def test_what_ranks_tell_each_other_arrives_to_the_bit(tmp_path: Path) -> None:
    values = [[0.1 + 0.2, math.nextafter(1, 2), 5e-324, -math.inf, math.nan], ["b", "ü" * 1000, None, {"x": [1, "2"]}]]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        heard = list(pool.map(_gathered, (0, 1), [tmp_path / "store"] * 2, values))
    assert repr(heard) == repr([values, values])
    assert repr(Ranks().gather(values[0])) == repr([values[0]])


def test_a_killed_rank_ends_the_run_and_another_number_resumes_it(
    tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    slow = {"steps": 400, "save": {"every": 5}}
    both = start(tmp_path, tree("run", accumulate=1, **slow), 2)
    began = time.monotonic()
    while not (tmp_path / "run" / "checkpoints" / "step-00000010").exists():
        assert both.poll() is None, (tmp_path / "run-2.log").read_text()[-2000:]
        assert time.monotonic() < began + 200, (tmp_path / "run-2.log").read_text()[-2000:]
        time.sleep(0.01)
    children = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert both.wait(60) != 0
    ours, _, launchers = (tmp_path / "run-2.log").read_text().partition("torch/distributed/elastic/")
    assert launchers
    assert "Traceback" not in ours
    refused = start(tmp_path, tree("run", accumulate=1, **slow), 1)
    assert refused.wait(200) == 2
    assert "accumulate" in (tmp_path / "run-1.log").read_text()
    last = len(metrics(tmp_path / "run")) + 3
    finish(start(tmp_path, tree("run", accumulate=2, **{**slow, "steps": last}), 1), tmp_path)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, last + 1))

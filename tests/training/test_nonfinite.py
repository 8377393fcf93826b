"""Losses and gradients that are not finite, from a cache that is really poisoned: skipped, counted, never kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libreflux.data.prepare import prepare_recipe
from libreflux.errors import RunError
from libreflux.recipe import Recipe
from libreflux.training import checkpoint, saving
from libreflux.training.callbacks import Callbacks, StepInfo
from libreflux.training.ema import decay, exponent
from libreflux.training.interrupt import Interrupted
from libreflux.training.loop import fit, open_for_training
from libreflux.training.nonfinite import LARGEST_NORM, at_fault, require_finite
from libreflux.training.ranks import Ranks
from tiny import poison_latents, sum_again

Tree = Callable[..., dict[str, Any]]


class Listener(Callbacks):
    """Keeps the steps, and sends this process SIGTERM in those of `stops`."""

    def __init__(self, *stops: int) -> None:
        self.stops, self.steps = stops, list[StepInfo]()

    def on_step(self, info: StepInfo) -> None:
        self.steps.append(info)
        if info.step in self.stops:
            os.kill(os.getpid(), signal.SIGTERM)


def everything_finite(folder: Path) -> bool:
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    return len(tensors) > 10 and all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_steps_with_a_poisoned_picture_are_skipped_and_resumed_across(recipe_tree: Tree, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "steps": 9,  # three epochs of three steps
        "save": {"every": 2, "keep": 9},
        "optimizer": {"kind": "adamw_bf16", "learning_rate": 1e-2, "schedule": "cosine"},
    }
    whole, stopped = (recipe_tree(tmp_path / name, **changes) for name in ("whole", "stopped"))  # with one cache
    prepare_recipe(Recipe.model_validate(whole))
    [poisoned] = poison_latents(tmp_path / "cache", 1)

    heard = Listener()
    result = fit(Recipe.model_validate(whole), heard)
    skipped = [info for info in heard.steps if info.at_fault]
    assert [info.epoch for info in skipped] == [0, 1, 2]
    assert all(info.at_fault == [poisoned] and info.loss is None and info.gradient_norm is None for info in skipped)
    assert all((poisoned in info.sample_ids) == bool(info.at_fault) for info in heard.steps)
    lines = [json.loads(line) for line in (tmp_path / "whole" / checkpoint.METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped") == [poisoned]] == [info.step for info in skipped]
    assert all((line["loss"] is None) == ("skipped" in line) for line in lines)
    found = checkpoint.listed(tmp_path / "whole")
    assert [one.step for one in found] == [2, 4, 6, 8, 9]
    assert all(everything_finite(one.path) for one in found)
    assert found[-1].state()["skips"]["total"] == 3
    assert int(load_file(found[-1].optimizer)["step"]) == 6

    for step in (skipped[0].step, skipped[1].step):
        with pytest.raises(Interrupted):
            fit(Recipe.model_validate(stopped), Listener(step))
    resumed = fit(Recipe.model_validate(stopped), Listener())
    assert resumed.read_bytes() == result.read_bytes()
    for one in found:
        for path in one.path.iterdir():
            assert path.read_bytes() == (tmp_path / "stopped" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_too_many_in_a_row_end_the_run_and_push_out_no_good_checkpoint(recipe_tree: Tree, tmp_path: Path) -> None:
    save, run = {"every": 1, "keep": 1}, tmp_path / "run"
    fit(Recipe.model_validate(recipe_tree(run, steps=2, save=save)))
    [shard] = (tmp_path / "cache").glob("shards/latents-*")
    healthy = shard.read_bytes()
    poison_latents(tmp_path / "cache")
    longer = Recipe.model_validate(recipe_tree(run, steps=7, save=save, max_skipped=3))
    with pytest.raises(RunError, match=r"3 steps in a row up to step 5 .* not finite.*; hint: .*learning_rate"):
        fit(longer)
    kept = checkpoint.listed(run)
    assert [one.step for one in kept] == [2, 3, 4]
    assert all(everything_finite(one.path) for one in kept)
    assert len({one.optimizer.read_bytes() for one in kept}) == 1
    with pytest.raises(RunError, match="3 steps in a row up to step 5"):  # it counts on where the checkpoint stood
        fit(longer)
    assert [one.step for one in checkpoint.listed(run)] == [2, 3, 4]  # nor does going on push out any
    with pytest.raises(RunError, match="has changed"):
        fit(Recipe.model_validate(recipe_tree(run, steps=7, save=save, batch=1)))
    assert [one.step for one in checkpoint.listed(run)] == [2, 3, 4]
    shard.write_bytes(healthy)
    sum_again(shard)
    fit(longer)
    assert [one.step for one in checkpoint.listed(run)] == [7]
    assert checkpoint.listed(run)[0].state()["skips"] == {"total": 2, "in_a_row": 0}


def test_a_run_with_spoilt_weights_goes_on_as_its_line_says(recipe_tree: Tree, tmp_path: Path) -> None:
    run, save = tmp_path / "run", {"every": 1, "keep": 2}

    def recipe(**changes: Any) -> Recipe:
        return Recipe.model_validate(recipe_tree(run, save=save, max_skipped=3, **changes))

    fit(recipe(steps=2))
    fast = recipe(steps=9, optimizer={"kind": "adamw", "learning_rate": 1000})
    fast = fast.model_copy(update={"optimizer": fast.optimizer.model_copy(update={"learning_rate": 1e30})})
    training = open_for_training(fast, run, checkpoint.latest(run), Callbacks(), Ranks(), "cpu", True)
    training.take_step()  # finite weights whose loss is not
    with checkpoint.Metrics(run, 2) as metrics:
        saving.save(training, metrics, Callbacks())
    slow = recipe(steps=9, batch=1)
    told = r"3 steps in a row up to step 6 .*remove the folders after step-00000002 in .*checkpoints and go on with"
    with pytest.raises(RunError, match=told):
        fit(slow, fork=True)
    kept = checkpoint.listed(run)
    assert [one.step for one in kept] == [2, 3, 4, 5]
    again = recipe(steps=9, optimizer={"kind": "adamw", "learning_rate": 1e-4})
    with pytest.raises(RunError, match="3 steps in a row up to step 8"):  # counted anew
        fit(again, fork=True)
    for one in checkpoint.listed(run)[1:]:
        shutil.rmtree(one.path)
    fit(recipe(steps=9, optimizer={"kind": "adamw", "learning_rate": 2e-4}), fork=True)
    assert [one.step for one in checkpoint.listed(run)] == [8, 9]
    assert checkpoint.listed(run)[-1].state()["skips"] == {"total": 0, "in_a_row": 0}


def test_a_gradient_alone_can_be_at_fault_and_moves_nothing(recipe_tree: Tree, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_tree(tmp_path / "run"))
    training = open_for_training(recipe, tmp_path / "run", None, Callbacks(), Ranks(), "cpu")

    def state() -> dict[str, torch.Tensor]:
        held = {**training.adapter.state_dict(), **training.optimizer.state_dict_tensors()}
        return {name: tensor.detach().clone() for name, tensor in held.items()}

    for _ in range(2):
        training.take_step()
    before, averages = state(), {name: tensor.clone() for name, tensor in training.averages.tensors().items()}
    hook = training.transformer.proj_out.register_full_backward_hook(
        lambda _, into, out: tuple(None if one is None else one * math.nan for one in into)
    )
    info = training.take_step()
    hook.remove()
    assert info.at_fault == info.sample_ids
    assert info.sample_ids
    assert all(math.isfinite(loss) for loss in info.losses)
    assert info.loss is None
    assert info.skipped == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in state().items())
    for key, tensor in training.averages.tensors().items():  # their time went on, towards the weights that stayed
        width, name = key.split("/", 1)
        expected = averages[key].lerp(before[name], 1 - decay(3, exponent(float(width))))
        assert torch.equal(tensor, expected)
    assert any(not torch.equal(tensor, averages[key]) for key, tensor in training.averages.tensors().items())
    taken = training.take_step()
    assert (taken.step, taken.at_fault, taken.skipped, training.skips.in_a_row) == (4, [], 1, 0)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state().items())


def test_who_is_at_fault() -> None:
    names = ["a", "b", "c"]
    assert at_fault(names, [1.0, math.nan, -math.inf], math.nan, 1.0) == ["b", "c"]
    assert at_fault(names, [1.0, 2.0, 3.0], math.inf, 1.0) == names
    assert at_fault(names, [1.0, 2.0, 3.0], 7.0, 1.0) == at_fault(names, [1.0, 2.0, 3.0], 7.0, None) == []
    # A finite gradient whose square is none: it would stay in the second moment for good, unless it is clipped.
    assert at_fault(names, [1.0, 2.0, 3.0], 1e30, None) == names
    assert at_fault(names, [1.0, 2.0, 3.0], 1e30, 1.0) == []
    assert torch.tensor(LARGEST_NORM).square().isfinite()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_never_kept(value: float, tmp_path: Path) -> None:
    fine = torch.nn.Parameter(torch.tensor([3e38, -3e38, 0.0], dtype=torch.bfloat16))
    require_finite([fine], 4, tmp_path)
    with pytest.raises(RunError, match="step 4 made weights that are not finite; nothing of it is saved"):
        require_finite([fine, torch.nn.Parameter(torch.tensor([[1.0, value]]))], 4, tmp_path)

"""fit() on a real tiny model: what it learns, what a step is, who is told what."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from libreflux.adapter.io import attach_file
from libreflux.data.order import step_plan
from libreflux.data.prepare import prepare_recipe
from libreflux.errors import RunError
from libreflux.flow.sigmas import beta_cdf
from libreflux.model.opening import open_model
from libreflux.model.source import weights_hash
from libreflux.recipe import Recipe, SigmaSpec
from libreflux.training import checkpoint
from libreflux.training.callbacks import Callbacks
from libreflux.training.gradient import accumulate_gradient
from libreflux.training.loop import open_for_training
from libreflux.training.objective import NoisedBatch, flow_matching_loss, keyed_noise
from libreflux.training.ranks import Ranks
from libreflux.training.step import draw_sigmas
from training.recorded import Tree
from training.recorded import recorded_fit as _fit

PICTURES = 5


# ---- what it learns -----------------------------------------------------------------------------------------------


def _held_out_loss(transformer: FluxTransformer2DModel, tree: dict[str, Any]) -> float:
    """Mean loss over every picture at 12 noises and sigmas that no training step draws."""
    batches, _ = prepare_recipe(Recipe.model_validate(tree))
    [unit] = step_plan(0, 0, batches.samples, 1, PICTURES, 1)
    batch, total = batches.batch(unit), 0.0
    for draw in range(12):
        noise = torch.stack([keyed_noise(batch.latents.shape[1:], 0, "held out", i, draw) for i in range(PICTURES)])
        sigma = draw_sigmas(SigmaSpec(), PICTURES, 999, draw)
        with torch.no_grad():
            total += float(flow_matching_loss(transformer, NoisedBatch(batch.latents, noise, sigma, batch.text)).mean())
    return total / 12


def test_training_lowers_the_loss_at_noise_it_never_saw(
    recipe_tree: Tree, tmp_path: Path, tiny_model_dir: Path
) -> None:
    tree = recipe_tree(tmp_path / "run", steps=40, optimizer={"kind": "adamw", "learning_rate": 1e-2})
    _, adapter = _fit(tree)
    transformer = open_model(tiny_model_dir).load_transformer()
    assert transformer is not None
    before = _held_out_loss(transformer, tree)
    attach_file(transformer, adapter)
    after = _held_out_loss(transformer, tree)
    assert after < 0.9 * before, (before, after)


def test_only_the_adapter_is_trained_and_the_file_says_of_what(
    recipe_tree: Tree, tmp_path: Path, tiny_model_dir: Path
) -> None:
    before = weights_hash(tiny_model_dir)
    tree = recipe_tree(tmp_path / "run", steps=2)
    recorder, adapter = _fit(tree)
    assert weights_hash(tiny_model_dir) == before
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == str(tiny_model_dir)
    assert metadata["model_hash"] == before
    assert metadata["step"] == "2"
    assert metadata["text_padding"] == "drop"
    assert metadata["recipe"] == Recipe.model_validate(tree).fingerprint()
    assert recorder.started is not None
    attached = attach_file(open_model(tiny_model_dir).load_transformer(), adapter)
    assert sorted(attached.layers) == sorted(row.name for row in recorder.started.resolved)


# ---- what a step is -----------------------------------------------------------------------------------------------


def test_a_step_is_the_weighted_mean_of_its_pictures_gradients(recipe_tree: Tree, tmp_path: Path) -> None:
    """Ten samples of two sources by 2 x 2, each picture alone through autograd as the reference."""
    path = recipe_tree(tmp_path / "run")["data"][0]["path"]
    sources = [{"path": path, "loss_weight": 0.5}, {"path": path, "prefix": "b ", "loss_weight": 2.0}]
    optimizer = {"kind": "adamw", "learning_rate": 1e-3, "clip": None}
    tree = recipe_tree(tmp_path / "run", data=sources, accumulate=2, optimizer=optimizer)
    recipe = Recipe.model_validate(tree)
    training = open_for_training(recipe, tmp_path / "run", None, Callbacks(), Ranks(), "cpu")
    for step in range(3):
        units = step_plan(0, step, training.batches.samples, 1, 2, 2)
        sigmas, losses = draw_sigmas(recipe.sigmas, units[0].total, 0, step), []
        for unit in units:
            for item, visit, slot in zip(unit.items, unit.visits, unit.slots, strict=True):
                one = training.batches.batch(replace(unit, items=(item,), visits=(visit,), slots=(slot,)))
                noise = keyed_noise(one.latents.shape[1:], 0, one.sample_ids[0], step, slot)[None]
                noised = NoisedBatch(one.latents, noise, sigmas[[slot]], one.text)
                loss = flow_matching_loss(training.transformer, noised)
                losses.append(loss.sum() * (0.5 if item < PICTURES else 2.0))
        parameters = list(training.adapter.parameters())
        gradient = torch.autograd.grad(torch.stack(losses).sum() / len(losses), parameters)
        expected = torch.cat([each.flatten() for each in gradient]).norm()
        assert training.take_step().gradient_norm == pytest.approx(float(expected), rel=1e-4)


def test_an_epoch_shows_every_picture_once(recipe_tree: Tree, tmp_path: Path) -> None:
    recorder, _ = _fit(recipe_tree(tmp_path / "run", steps=6))  # 5 pictures by 2: three steps an epoch
    for epoch in (0, 1):
        shown = [name for step in recorder.steps if step.epoch == epoch for name in step.sample_ids]
        assert len(shown) == len(set(shown)) == PICTURES


def test_the_loss_told_is_the_mean_over_the_steps_pictures(recipe_tree: Tree, tmp_path: Path) -> None:
    recorder, _ = _fit(recipe_tree(tmp_path / "run", steps=3, accumulate=2))
    for step in recorder.steps:
        assert len(step.losses) == len(step.sigmas) == len(step.sample_ids)
        assert step.loss == pytest.approx(sum(step.losses) / len(step.losses))


@pytest.mark.parametrize("count", [1, 3, 16])
def test_one_sigma_per_stratum_also_in_a_short_step(count: int) -> None:
    spec = SigmaSpec()
    for step in range(5):
        sigmas = draw_sigmas(spec, count, 3, step)
        strata = (beta_cdf(sigmas.double(), 2.0, 2.0) * count).floor().clamp(max=count - 1)
        assert sorted(strata.int().tolist()) == list(range(count))
        assert torch.equal(sigmas, draw_sigmas(spec, count, 3, step))
    assert not torch.equal(draw_sigmas(spec, count, 3, 0), draw_sigmas(spec, count, 4, 0))


def test_independent_and_uniform_laws_are_obeyed() -> None:
    loose = draw_sigmas(SigmaSpec(stratified=False), 8, 0, 0)
    strata = (beta_cdf(loose.double(), 2.0, 2.0) * 8).floor().int().tolist()
    assert sorted(strata) != list(range(8))
    uniform = draw_sigmas(SigmaSpec(law="uniform"), 1000, 0, 0)
    assert float((uniform.sort().values - torch.linspace(0, 1, 1000)).abs().max()) < 2e-3  # one per thousandth
    shifted = draw_sigmas(SigmaSpec(law="logit-normal", mean=1.0, shift=3.0, uniform_floor=0.2), 1000, 0, 0)
    z = (torch.logit(shifted.double() / (3 - 2 * shifted.double())) - 1).sort().values
    ranks = 0.8 * torch.special.ndtr(z) + 0.2 * shifted.double().sort().values
    assert float((ranks - torch.linspace(0, 1, 1000)).abs().max()) < 2e-3


def test_gradient_norms_of_layer_groups_are_written_on_request(recipe_tree: Tree, tmp_path: Path) -> None:
    recorder, _ = _fit(recipe_tree(tmp_path / "run", steps=1, gradient_norms=True))
    [info] = recorder.steps
    line = json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())
    assert info.group_norms is not None
    assert info.gradient_norm is not None
    assert line["gradient_norms"] == info.group_norms
    assert "single_transformer_blocks.*.attn.to_q" in info.group_norms  # of both single blocks
    assert math.hypot(*info.group_norms.values()) == pytest.approx(info.gradient_norm, rel=1e-9)
    assert min(info.group_norms.values()) >= 0
    assert max(info.group_norms.values()) < info.gradient_norm


@pytest.mark.parametrize("at_once", [None, 0, 6, 100])
def test_gradients_are_summed_in_fp32(at_once: int | None) -> None:
    """1 + 8 x 2^-9: each summand is half a unit of bf16 at 1 and would vanish."""
    sizes = [(2, 2), (3,), (1,), (2,)]
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in sizes]
    total = torch.zeros(10)
    for value in [1.0, *[2.0**-9] * 8]:
        for index in (0, 2, 3):
            parameters[index].grad = torch.full(sizes[index], value * (index + 1), dtype=torch.bfloat16)
        accumulate_gradient(total, parameters, at_once=at_once)
        assert all(parameter.grad is None for parameter in parameters)
    one = 1 + 2**-6
    assert total.tolist() == [one] * 4 + [0.0] * 3 + [3 * one] + [4 * one] * 2


# ---- who is told what ---------------------------------------------------------------------------------------------


def test_events_come_in_order_and_samples_follow_their_checkpoint(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(
        tmp_path / "run",
        steps=5,
        save={"every": 2, "keep": 1},
        samples={"every": 3, "at_start": True, "prompts": ["a fox"]},
    )
    recorder, _ = _fit(tree)
    steps = [("step", step) for step in range(1, 6)]
    assert recorder.events == [
        ("start", 0),
        ("sample", 0),
        steps[0],
        steps[1],
        ("save", 2),
        steps[2],
        ("sample", 3),
        steps[3],
        ("save", 4),
        steps[4],
        ("save", 5),
    ]
    assert [found.step for found in checkpoint.listed(tmp_path / "run")] == [5]
    metrics = [json.loads(line) for line in (tmp_path / "run" / checkpoint.METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in metrics] == [(info.step, info.loss) for info in recorder.steps]
    assert {"gradient_norm", "learning_rate", "pictures_per_second", "epoch"} <= set(metrics[0])


def test_held_out_pictures_are_measured_and_never_trained_on(recipe_tree: Tree, tmp_path: Path, share: float) -> None:
    tree = recipe_tree(tmp_path / "run", steps=5, held_out={"share": share, "every": 2}, save={"every": 4})
    recorder, _ = _fit(tree)
    assert recorder.started is not None
    assert recorder.started.held_out is not None
    [apart] = recorder.started.held_out.sample_ids
    shown = {name for info in recorder.steps for name in info.sample_ids}
    assert len(shown) == PICTURES - 1
    assert apart not in shown
    steps = [("step", step) for step in range(1, 6)]
    assert recorder.events == [
        ("start", 0),
        ("measure", 0),
        steps[0],
        steps[1],
        ("measure", 2),
        steps[2],
        steps[3],
        ("save", 4),
        ("measure", 4),
        steps[4],
        ("save", 5),
        ("measure", 5),
    ]
    with pytest.raises(RunError, match=r"held_out\.share"):
        _fit({**tree, "steps": 6, "held_out": {}})


# ---- other adapters -----------------------------------------------------------------------------------------------


def test_a_lora_learns_and_another_run_goes_on_from_its_file(
    recipe_tree: Tree, tmp_path: Path, tiny_model_dir: Path
) -> None:
    lora = {"kind": "lora", "rank": 4, "targets": [{"layers": "**.attn.**"}, {"layers": "proj_out"}]}
    tree = recipe_tree(tmp_path / "lora", adapter=lora, steps=30, optimizer={"kind": "adamw", "learning_rate": 1e-2})
    recorder, adapter = _fit(tree)
    assert recorder.started is not None
    assert recorder.started.start_norm == 0
    transformer = open_model(tiny_model_dir).load_transformer()
    assert transformer is not None
    before = _held_out_loss(transformer, tree)
    attach_file(transformer, adapter)
    assert _held_out_loss(transformer, tree) < 0.97 * before
    onwards = {"kind": "lora", "init_from": str(adapter)}
    recorder, longer = _fit(recipe_tree(tmp_path / "onwards", adapter=onwards, steps=1))
    assert recorder.started is not None
    assert recorder.started.start_norm is not None
    assert recorder.started.start_norm > 1e-3
    first, second = load_file(adapter), load_file(longer)
    assert first.keys() == second.keys()
    moved = max(float((first[key] - second[key]).abs().max()) for key in first)
    assert 0 < moved <= 1.1e-3  # one step of 1e-3 away from the file

"""Pictures whose target is the base's own velocity: the formula, what it costs, and what a zero adapter makes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.data.order import step_plan
from libreflux.flow.path import interpolate, velocity_target
from libreflux.model.int8 import quantise_model
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.recipe import Recipe
from libreflux.training.callbacks import Callbacks
from libreflux.training.loop import fit, open_for_training
from libreflux.training.objective import NoisedBatch, flow_matching_loss, keyed_noise, regularised_target
from libreflux.training.ranks import Ranks
from libreflux.training.step import draw_sigmas
from tiny import tiny_transformer

Given = tuple[Tensor, Tensor, Tensor, TextConditioning]
MIXED = (True, False, True, False)


def _given(dtype: torch.dtype = torch.float32) -> Given:
    """Latents, noise, sigma and text of four pictures; prompts of 3, 7, 7 and 1 tokens."""
    generator = torch.Generator().manual_seed(5)
    latents, noise = torch.randn(2, 4, 16, 4, 6, generator=generator, dtype=dtype)
    tokens = [torch.randn(length, 24, generator=generator, dtype=dtype) for length in (3, 7, 7, 1)]
    pooled = torch.randn(4, 16, generator=generator, dtype=dtype)
    return latents, noise, torch.linspace(0.1, 0.9, 4), TextConditioning(tokens, pooled)


def _one(given: Given, i: int) -> Given:
    return given[0][i : i + 1], given[1][i : i + 1], given[2][i : i + 1], given[3].index([i])


def _attach(
    transformer: FluxTransformer2DModel,
    *,
    init: Literal["kaiming", "ones", "perturbed"] = "ones",
    rank: int | None = None,
) -> Adapter:
    target = Target(layers="**", rank=rank) if rank else Target(layers="**", factor=4)
    dtype = next(transformer.parameters()).dtype
    return attach(transformer, resolve(linear_shapes(transformer), [target]), dtype=dtype, init=init, scale=0.1)


def _losses(
    transformer: FluxTransformer2DModel, adapter: Adapter, given: Given, regularised: tuple[bool, ...]
) -> Tensor:
    target = regularised_target(transformer, adapter, NoisedBatch(*given), regularised)
    assert not target.requires_grad  # the base's pass leaves no graph
    return flow_matching_loss(transformer, NoisedBatch(*given), target=target)


def _plain(adapted: FluxTransformer2DModel, base: FluxTransformer2DModel, given: Given, regularised: bool) -> Tensor:
    """|v_adapted - v_base|² or |v_adapted - (noise - x0)|² of one picture, from two networks."""
    latents, noise, sigma, text = given
    x_sigma, ids = pack(interpolate(latents, noise, sigma)), image_ids(*latents.shape[-2:])
    wanted = velocity(base, x_sigma, sigma, text, ids) if regularised else pack(velocity_target(latents, noise))
    return (velocity(adapted, x_sigma, sigma, text, ids) - wanted.detach()).square().mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradient_are_those_of_the_plain_formula(checkpointing: bool) -> None:
    """In fp64, picture by picture, with the base in a network of its own."""
    base = tiny_transformer().double()
    adapted = copy.deepcopy(base)
    adapter, given = _attach(adapted, init="perturbed"), _given(torch.float64)
    if checkpointing:
        adapted.enable_gradient_checkpointing()
    expected = torch.stack([_plain(adapted, base, _one(given, i), flag) for i, flag in enumerate(MIXED)])
    losses = _losses(adapted, adapter, given, MIXED)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert 1e-6 < losses[0] < 0.1 * losses[1]  # near the base, far from the picture
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    parameters = list(adapter.parameters())
    found, wanted = (torch.autograd.grad(each @ weights, parameters) for each in (losses, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)
    alone = torch.autograd.grad(_losses(adapted, adapter, given, MIXED)[0], parameters)
    assert sum(float(each.abs().max()) > 0 for each in alone) > len(alone) / 2  # it reaches the parameters


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rank", [None, 2])
def test_an_adapter_without_effect_has_no_loss_and_no_gradient(base: str, rank: int | None) -> None:
    transformer = tiny_transformer()
    if base != "fp32":
        transformer.bfloat16()
    if base == "int8":
        quantise_model(transformer)
    adapter = _attach(transformer, init="kaiming", rank=rank)
    losses = _losses(transformer, adapter, _given(), (True,) * 4)
    assert losses.tolist() == [0.0] * 4
    losses.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in adapter.parameters())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    assert _losses(transformer, adapter, _given(), (True,) * 4).min() > 0


def test_only_regularised_pictures_pay_for_the_second_pass() -> None:
    transformer = tiny_transformer()
    adapter, rows = _attach(transformer), []
    transformer.register_forward_hook(lambda module, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True)
    for regularised, passes in ((MIXED, [2, 4]), ((False,) * 4, [4])):
        rows.clear()
        _losses(transformer, adapter, _given(), regularised)
        assert rows == passes


def test_disabled_is_the_base_to_the_bit_and_ends_with_its_block() -> None:
    transformer, given = tiny_transformer(), _given()
    with torch.no_grad():
        base = flow_matching_loss(transformer, NoisedBatch(*given))
        adapter = _attach(transformer, init="perturbed")
        adapted = flow_matching_loss(transformer, NoisedBatch(*given))
        with adapter.disabled():
            with pytest.raises(ZeroDivisionError), adapter.disabled():
                raise ZeroDivisionError
            assert torch.equal(flow_matching_loss(transformer, NoisedBatch(*given)), base)
        assert torch.equal(flow_matching_loss(transformer, NoisedBatch(*given)), adapted)
        assert not torch.equal(adapted, base)


# ---- in a run -----------------------------------------------------------------------------------------------------

Tree = Callable[..., dict[str, Any]]


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_step_mixes_both_kinds_by_weight_and_reports_them_apart(recipe_tree: Tree, tmp_path: Path) -> None:
    path = recipe_tree(tmp_path / "run")["data"][0]["path"]
    sources = [{"path": path}, {"path": path, "prefix": "b ", "regularisation": True, "loss_weight": 5.0}]
    optimizer = {"kind": "adamw", "learning_rate": 1e-2, "clip": None}
    tree = recipe_tree(tmp_path / "run", data=sources, accumulate=2, batch=3, optimizer=optimizer)
    recipe = Recipe.model_validate(tree)
    training = open_for_training(recipe, tmp_path / "run", None, Callbacks(), Ranks(), "cpu")
    base = tiny_transformer()
    for step in range(4):
        units = step_plan(0, step, training.batches.samples, 1, 3, 2)
        sigmas = draw_sigmas(recipe.sigmas, units[0].total, 0, step)
        losses: dict[bool, list[Tensor]] = {False: [], True: []}
        for unit in units:
            for item, visit, slot in zip(unit.items, unit.visits, unit.slots, strict=True):
                one = training.batches.batch(replace(unit, items=(item,), visits=(visit,), slots=(slot,)))
                assert one.regularised == (item >= 5,)
                noise = keyed_noise(one.latents.shape[1:], 0, one.sample_ids[0], step, slot)[None]
                given = (one.latents, noise, sigmas[[slot]], one.text)
                losses[item >= 5].append(_plain(training.transformer, base, given, item >= 5))
        total = (torch.stack(losses[False]).sum() + 5 * torch.stack(losses[True]).sum()) / units[0].total
        gradient = torch.autograd.grad(total, list(training.adapter.parameters()))
        info = training.take_step()
        expected = torch.cat([each.flatten() for each in gradient]).norm()
        assert info.gradient_norm == pytest.approx(float(expected), rel=1e-4)
        for told, each in ((info.loss, losses[False]), (info.regularisation_loss, losses[True])):
            mean = sum(loss.item() for loss in each) / len(each) if each else None
            assert told == (None if mean is None else pytest.approx(mean, rel=1e-4, abs=1e-9))


def test_a_regularisation_set_alone_leaves_a_zero_adapter_at_zero(recipe_tree: Tree, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "adapter": {"kind": "lora", "rank": 2},
        "optimizer": {"kind": "adamw_bf16", "learning_rate": 1e-2},
        "steps": 3,
    }
    data = recipe_tree(tmp_path / "kept")["data"]
    kept = fit(
        Recipe.model_validate(recipe_tree(tmp_path / "kept", data=[data[0] | {"regularisation": True}], **common))
    )
    ups = [tensor for name, tensor in load_file(kept).items() if "lora_up" in name]
    assert ups
    assert not any(tensor.any() for tensor in ups)
    assert [(line["loss"], line["regularisation_loss"]) for line in _metrics(tmp_path / "kept")] == [(None, 0.0)] * 3
    moved = fit(Recipe.model_validate(recipe_tree(tmp_path / "moved", **common)))
    assert all(tensor.any() for name, tensor in load_file(moved).items() if "lora_up" in name)
    assert "regularisation_loss" not in _metrics(tmp_path / "moved")[0]

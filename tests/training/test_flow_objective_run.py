"""`guided_target` and `hold_base` in runs: neutral ones, each loss by hand, on two processes, foretold."""

from __future__ import annotations

import copy
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from least import LEAST
from libreflux.adapter.adapter import Adapter
from libreflux.data.order import step_plan
from libreflux.errors import RecipeError, RunError
from libreflux.recipe import Recipe, load_recipe
from libreflux.training import estimate, flow_objective, trace
from libreflux.training.callbacks import Callbacks
from libreflux.training.flow_objective import Roles
from libreflux.training.live_bytes import LiveBytes
from libreflux.training.loop import fit, open_for_training
from libreflux.training.objective import NoisedBatch, keyed_noise
from libreflux.training.ranks import Ranks
from libreflux.training.step import draw_sigmas
from libreflux.training.training_adapter import together
from libreflux.workflows.dry_run import dry_run
from libreflux.workflows.train import train
from model.bases import adapted, based
from tiny import tiny_transformer
from training.recorded import Tree
from training.test_adversarial_run import fitted_in_a_process, lines
from training.test_compiled import SMALL
from training.test_flow_objective import BOTH, WEIGHTS, empty_prompt, noised

KEYS: dict[str, Any] = {
    "guided_target": {"scale": 3.0, "decay": 0.5},
    "hold_base": {"weight": 0.4, "sigmas": [0.3, 1.0]},
}


def test_neutral_values_cost_nothing_and_give_the_same_bytes(recipe_tree: Tree, tmp_path: Path, share: float) -> None:
    """As a recipe without the keys; and what is measured on held-out pictures knows nothing of them."""
    common = {"steps": 2, "held_out": {"share": share, "every": 1}, "save": {"every": 2}}
    neutral = {"guided_target": {"scale": 1}, "hold_base": {"weight": 0}}
    for name, keys in (("without", {}), ("neutral", neutral), ("both", KEYS)):
        train(recipe_tree(tmp_path / name, **common, **keys))
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("without", "neutral", "both")]
    assert files[0] == files[1] != files[2]
    assert lines(tmp_path / "without") == lines(tmp_path / "neutral")
    assert {"plain_loss", "guided_loss"} < set(lines(tmp_path / "both")[0])
    assert "plain_loss" not in lines(tmp_path / "neutral")[0]
    measured = [(tmp_path / name / "held_out.jsonl").read_text().splitlines()[0] for name in ("without", "both")]
    assert measured[0] == measured[1]
    with pytest.raises(RunError, match="guided_target"):
        fit(Recipe.model_validate(recipe_tree(tmp_path / "neutral", **{**common, **KEYS, "steps": 3})))
    fit(Recipe.model_validate(recipe_tree(tmp_path / "neutral", **{**common, "steps": 3})))


def test_each_loss_of_a_step_and_its_gradient_by_hand(recipe_tree: Tree, tmp_path: Path) -> None:
    """Dropped captions, regularisation, weights and accumulation; each picture alone, from three networks."""
    path = recipe_tree(tmp_path / "run")["data"][0]["path"]
    sources = [
        {"path": path, "caption_dropout": 0.5, "loss_weight": 2.0},
        {"path": path, "prefix": "b ", "regularisation": True},
    ]
    optimizer = {"kind": "adamw", "learning_rate": 1e-2, "clip": None}
    tree = recipe_tree(tmp_path / "run", **KEYS, data=sources, accumulate=2, batch=3, optimizer=optimizer)
    training = open_for_training(Recipe.model_validate(tree), tmp_path / "run", None, Callbacks(), Ranks(), "cpu")
    base, empty = tiny_transformer(), training.batches.empty_prompt()
    kinds = set()
    for step in range(3):
        own, found, weighted = copy.deepcopy(training.transformer), [], []
        units = step_plan(0, step, training.batches.samples, 1, 3, 2)
        sigmas = draw_sigmas(training.recipe.sigmas, units[0].total, 0, step)
        for unit in units:
            for item, visit, slot in zip(unit.items, unit.visits, unit.slots, strict=True):
                one = training.batches.batch(replace(unit, items=(item,), visits=(visit,), slots=(slot,)))
                noise = keyed_noise(one.latents.shape[1:], 0, one.sample_ids[0], step, slot)[None]
                given = NoisedBatch(one.latents, noise, sigmas[[slot]], one.text)
                x, sigma = given.x_sigma, given.sigma
                with torch.no_grad():
                    b, u = given.velocity(base, x, sigma), given.velocity(own, x, sigma, empty)
                v, kept = given.velocity(training.transformer, x, sigma), one.regularised[0]
                scale = 1 + 2 * sigma**0.5 if one.captions[0] else 1.0
                loss = (v - (b if kept else u + scale * (given.target - u))).square().mean()
                held = not kept and float(sigma) >= 0.3
                kinds.add((kept, one.captions[0] == "", held))
                loss = loss + 0.4 * (v - b).square().mean() if held else loss
                found.append((slot, loss.item()))
                weighted.append(loss * (1.0 if kept else 2.0) / units[0].total)
        gradient = torch.autograd.grad(torch.stack(weighted).sum(), list(training.adapter.parameters()))
        info = training.take_step()
        assert list(info.losses) == pytest.approx([loss for _, loss in sorted(found)], rel=1e-4, abs=1e-8)
        assert info.gradient_norm == pytest.approx(float(torch.cat([one.flatten() for one in gradient]).norm()), 1e-4)
    assert len(kinds) >= 4


def test_two_processes_are_one_with_twice_the_passes(recipe_tree: Tree, tmp_path: Path) -> None:
    common = {**KEYS, "steps": 3, "ema": [], "device": "cpu", "save": {"every": 3}}
    one, two = (recipe_tree(tmp_path / name, **common, accumulate=n) for name, n in (("one", 2), ("two", 1)))
    fit(Recipe.model_validate(one))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        list(pool.map(fitted_in_a_process, (0, 1), [port] * 2, [two] * 2))
    alone, both = (load_file(tmp_path / run / "adapter.safetensors") for run in ("one", "two"))
    for key, tensor in alone.items():
        torch.testing.assert_close(both[key], tensor, rtol=1e-3, atol=1e-5)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for told in ("loss", "plain_loss", "guided_loss", "hold_base_loss", "gradient_norm"):
            assert a.get(told) == pytest.approx(b.get(told), rel=1e-4, abs=1e-8)


def both_on(transformer: FluxTransformer2DModel) -> tuple[Adapter, Adapter]:
    """What is trained together with a training adapter over it, and that alone."""
    adapter, beside = adapted(transformer), adapted(transformer, "**.attn.**")
    for layer in beside.layers.values():
        layer.origin = "a file"
        layer.delta.requires_grad_(False)
    for layer in adapter.layers.values():
        layer.delta.requires_grad_(True)
    return together(adapter, beside), beside


@pytest.mark.parametrize("with_beside", [False, True])
def test_the_trace_of_a_pass_is_the_real_one(with_beside: bool) -> None:
    real, meta = based("fp32"), based("fp32")
    adapter, beside = both_on(real) if with_beside else (adapted(real), None)
    roles = Roles([False] * 4, [True] * 4, [True] * 4)
    with trace.attention_in_tiles(), LiveBytes() as live:
        given: Any = {"keys": BOTH, "roles": roles, "empty": empty_prompt(), "beside": beside}
        flow_objective.learn(real, adapter, noised(), WEIGHTS, **given)
    _ = both_on(meta) if with_beside else adapted(meta)
    meta.to("meta")
    traced = trace.trace_pass(meta, 4, (4, 6), 7, learn=estimate._learning(meta, None, BOTH))
    assert abs(traced - live.peak) < 0.1 * live.peak


def test_a_dry_run_tells_the_passes(recipe_tree: Tree, tmp_path: Path) -> None:
    told = dry_run(recipe_tree(tmp_path / "run", **KEYS)).text(width=200)
    line = (
        "passes for each picture: one with gradient, and without gradient 0.9 for guided_target and 0.78 for hold_base"
    )
    assert f"\n{line}: a step takes about 1.8 times as long as without (estimated)\n" in told
    assert "passes for each picture" not in dry_run(recipe_tree(tmp_path / "run")).text(width=200)
    on_a_card = {**SMALL, "steps": 300_000, "compile": "auto", "device": "cuda"}
    found = dry_run(recipe_tree(tmp_path / "run", **KEYS, **on_a_card))
    assert "about 360 s to compile" in str(found.compile)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["guided_target.scale=0.5"], r"guided_target\.scale: .*greater than or equal to 1"),
        (["guided_target.decay=1"], r"guided_target\.scale: this key is needed"),
        (["guided_target={scale: 3, decay: -1}"], r"guided_target\.decay"),
        (["guided_target={scale: 1, decay: 1}"], "decay does nothing at scale 1"),
        (["guided_target=null"], r"it is empty: write \{scale: 3\}"),
        (["guided_target.scale=2", "data.0.caption_dropout=1"], "drops every caption"),
        (["hold_base.weight=-1"], r"hold_base\.weight: .*greater than or equal to 0"),
        (["hold_base={weight: 1, sigmas: [0.8, 0.2]}"], "the lower one first"),
        (["hold_base={weight: 1, sigmas: [0.5, 1.5]}"], r"two noise levels in \[0, 1\]"),
        (["hold_base={weight: 0, sigmas: [0.5, 1]}"], "sigmas does nothing at weight 0"),
        (["hold_base.weight=1", "data.0.regularisation=true"], "all data is for regularisation"),
        (
            ["hold_base.weight=1", "guided_target.scale=2", "objective=distil", "distil={guidance: 3}"],
            "guided_target and hold_base do nothing under objective: distil",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told) as refused:
        load_recipe(None, [*LEAST, *overrides])
    assert "\n" not in str(refused.value)


def test_recipes_without_the_keys_are_the_bytes_that_they_were() -> None:
    """Of versions that knew none of them."""
    recipe = load_recipe(None, LEAST)
    assert not {"guided_target", "hold_base"} & set(recipe.resolved())
    assert recipe.fingerprint() == "70895097546e685930930e2e13dc413d4c1b1a0fd677a4258e751734cde48468"
    assert (
        load_recipe(None, [*LEAST, "guided_target.scale=1", "hold_base.weight=0"]).fingerprint() == recipe.fingerprint()
    )
    chosen = load_recipe(None, [*LEAST, "guided_target.scale=3", "hold_base={weight: 0.2, sigmas: [0.5, 1]}"])
    assert chosen.fingerprint() != recipe.fingerprint()
    assert Recipe.model_validate(chosen.resolved()) == chosen

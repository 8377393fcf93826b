"""Distillation: where the student's one step leads, and that the teacher is the base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.io import load_adapter
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.data.cache import Cache
from libreflux.errors import RecipeError
from libreflux.flow.guidance import cfg
from libreflux.flow.path import interpolate
from libreflux.flow.schedule import ladder
from libreflux.model.facts import read_facts, write_facts
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.recipe import DistilSpec, Recipe, load_recipe
from libreflux.sample.denoise import denoise
from libreflux.training.callbacks import Callbacks, Started
from libreflux.training.loop import fit
from libreflux.training.objective import NoisedBatch, chord, distilled_target, on_rungs, teacher_path
from libreflux.workflows.adapters import adapted_facts
from tiny import tiny_transformer


def test_sigmas_climb_to_the_nearest_rung() -> None:
    sigma = torch.tensor([0.01, 0.25, 0.2500001, 0.5, 0.74, 0.76, 1.0])
    assert on_rungs(sigma, 4).tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0]
    shifted = on_rungs(torch.linspace(0.001, 1, 200), 4, shift=3.0)
    assert set(shifted.tolist()) == set(ladder(4, 3.0)[:-1].tolist())


def test_the_chord_of_a_linear_field_is_the_closed_form_and_one_step_of_it_arrives() -> None:
    x, path = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[1.0, 0.5], [0.8, 0.3], [0.5, 0.0]]).double()
    found = chord(lambda x, _: 1.5 * x, x, path)
    for i, (first, second) in enumerate([(-0.2, -0.3), (-0.2, -0.3)]):
        factor = (1 + 1.5 * first) * (1 + 1.5 * second)
        torch.testing.assert_close(found[i], x[i] * (factor - 1) / -0.5)
    torch.testing.assert_close(chord(lambda x, _: torch.ones_like(x) * 7, x, path), torch.full_like(x, 7))


@pytest.fixture(scope="module")
def student() -> tuple[Any, Adapter]:
    transformer = tiny_transformer()
    shapes = linear_shapes(transformer)
    adapter = attach(transformer, resolve(shapes, [Target(layers="**", factor=4)]), init="ones", scale=0.1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return transformer, adapter


def given() -> tuple[Tensor, Tensor, TextConditioning, TextConditioning]:
    draw = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, 3, 16, 4, 6, generator=draw)
    tokens = [torch.randn(length, 24, generator=draw) for length in (3, 5, 1)]
    empty = TextConditioning([torch.randn(1, 24, generator=draw)], torch.randn(1, 16, generator=draw))
    return latents, noise, TextConditioning(tokens, torch.randn(3, 16, generator=draw)), empty


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_step_of_the_student_leads_where_the_teachers_guided_steps_lead(
    student: tuple[Any, Adapter], shift: float
) -> None:
    transformer, adapter = student
    latents, noise, text, empty = given()
    spec, coarse, fine = DistilSpec(guidance=2.5, steps=4, substeps=3), ladder(4, shift), ladder(12, shift)
    rungs = (0, 1, 3)
    sigma = coarse[list(rungs)]
    target = distilled_target(transformer, adapter, NoisedBatch(latents, noise, sigma, text), empty, spec, shift=shift)
    ids = image_ids(4, 6)
    for i, rung in enumerate(rungs):

        def guided(x: Tensor, at: float, step: int, words: TextConditioning = text.index([i])) -> Tensor:
            both = [velocity(transformer, x, torch.tensor([at]), prompt, ids) for prompt in (words, empty)]
            return cfg(both[0], both[1], 2.5)

        x = pack(interpolate(latents, noise, sigma))[i : i + 1]
        with torch.no_grad(), adapter.disabled():
            *_, last = denoise(guided, x, fine[3 * rung : 3 * rung + 4])
        arrived = x + (coarse[rung + 1] - coarse[rung]) * target[i : i + 1]
        torch.testing.assert_close(arrived, last.x, atol=2e-5, rtol=1e-4)
    assert teacher_path(sigma, 4, 3, shift).T.tolist() == [fine[3 * rung : 3 * rung + 4].tolist() for rung in rungs]


def test_without_steps_the_target_is_the_bases_guided_velocity(student: tuple[Any, Adapter]) -> None:
    transformer, adapter = student
    latents, noise, text, empty = given()
    sigma = torch.tensor([0.2, 0.5, 0.9])
    noised = NoisedBatch(latents, noise, sigma, text)
    target = distilled_target(transformer, adapter, noised, empty, DistilSpec(guidance=4.0))
    x, ids = pack(interpolate(latents, noise, sigma)), image_ids(4, 6)
    with torch.no_grad():
        live = velocity(transformer, x, sigma, text, ids)
        with adapter.disabled():
            v_c = velocity(transformer, x, sigma, text, ids)
            v_u = velocity(transformer, x, sigma, empty.index([0, 0, 0]), ids)
    torch.testing.assert_close(target, v_u + 4 * (v_c - v_u))
    assert not torch.allclose(live, v_c, atol=1e-3)
    assert not target.requires_grad


def test_a_run_learns_the_teachers_guidance_and_its_adapter_says_how_to_draw(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes = {
        "objective": "distil",
        "distil": {"guidance": 3.0, "steps": 4},
        "steps": 80,
        "sigmas": {"law": "uniform"},
        "optimizer": {"learning_rate": 2e-3},
    }
    result = fit(Recipe.model_validate(recipe_tree(tmp_path / "run", **changes)))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])
    with safe_open(result, "pt") as saved:
        facts = saved.metadata()
    assert (facts["sampling_steps"], facts["guidance"]) == ("4", "1.0")


def test_a_run_without_steps_can_be_resumed(recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    changes = {"objective": "distil", "distil": {"guidance": 3.0}}
    fit(Recipe.model_validate(recipe_tree(tmp_path / "run", **changes, steps=1)))
    fit(Recipe.model_validate(recipe_tree(tmp_path / "run", **changes, steps=2)))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["objective=distil"], "distil section"),
        (["distil.guidance=3"], "objective: distil"),
        (["objective=distil", "distil={}"], "the teacher is the student"),
        (["objective=distil", "distil={guidance: 3, substeps: 4}"], "substeps is for steps"),
        (["objective=distil", "distil={guidance: 3}", "data.0.regularisation=true"], "regularisation"),
    ],
)
def test_what_makes_no_distillation_is_refused(overrides: list[str], told: str) -> None:
    common = ["data.0.path=x", "resolution=128", "steps=1", "out=o"]
    with pytest.raises(RecipeError, match=told):
        load_recipe(None, [*common, *overrides])


def test_a_model_whose_ladder_depends_on_the_pictures_size_makes_no_few_step_student(
    recipe_tree: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    write_facts(tmp_path / "model", dataclasses.replace(read_facts(tiny_model_dir), shift=None))
    changes = {"model": str(tmp_path / "model"), "objective": "distil", "distil": {"guidance": 3.0, "steps": 4}}
    with pytest.raises(RecipeError, match=r"distil\.steps.*depend"):
        fit(Recipe.model_validate(recipe_tree(tmp_path / "run", **changes)))


@pytest.mark.parametrize(
    ("steps", "guidance", "most", "tokens"), [(4, 1.0, 256, 512), (28, 3.5, 256, 256), (4, 1.0, 600, 600)]
)
@pytest.mark.parametrize("objective", ["flow", "distil"])
def test_a_training_sees_and_records_as_many_tokens_as_its_result_is_drawn_with(
    recipe_tree: Callable[..., dict[str, Any]],
    tiny_model_dir: Path,
    tmp_path: Path,
    objective: str,
    steps: int,
    guidance: float,
    most: int,
    tokens: int,
) -> None:
    """A few-step base as schnell is, one that is none, and one that reads more than the freed models' 512."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    facts = dataclasses.replace(read_facts(tiny_model_dir), steps=steps, guidance=guidance, max_tokens=most)
    write_facts(tmp_path / "model", facts)
    changes: dict[str, Any] = {"model": str(tmp_path / "model"), "steps": 1}
    if objective == "distil":
        changes |= {"objective": "distil", "distil": {"guidance": 3.0}}
    told: list[Started] = []

    class Listener(Callbacks):
        def on_start(self, started: Started) -> None:
            told.append(started)

    result = fit(Recipe.model_validate(recipe_tree(tmp_path / "run", **changes)), Listener())
    file = load_adapter(result)
    drawn = adapted_facts(facts, [(file, 1.0)])
    cached = Cache(tmp_path / "cache").settings["max_tokens"]
    assert (cached, int(file.metadata["max_tokens"]), told[0].facts.max_tokens, drawn.max_tokens) == (tokens,) * 4
    assert drawn.steps == told[0].facts.steps == (28 if objective == "flow" else steps)
    assert drawn.guidance == told[0].facts.guidance == (3.5 if objective == "flow" else 1.0)

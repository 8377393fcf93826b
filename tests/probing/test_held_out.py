"""A real tiny model on real held-out pictures, against the training loss computed one picture at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from libreflux.data.held_out import HeldOut
from libreflux.data.prepare import prepare_recipe
from libreflux.errors import ModelError
from libreflux.probing.held_out import measure_held_out
from libreflux.probing.metrics.measures import paired_noise
from libreflux.recipe import Recipe
from libreflux.training.objective import NoisedBatch, flow_matching_loss
from tiny import tiny_transformer

SIGMAS = (0.2, 0.8)


def write_pictures(folder: Path, shapes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for number, shape in enumerate(shapes):
        random = np.random.default_rng((number, *shape))
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a small green frog, {'very ' * number}calm")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Recipe:
    folder = tmp_path_factory.mktemp("held-out")
    trained = write_pictures(folder / "trained", [(48, 48)])
    apart = write_pictures(folder / "apart", [(40, 40), (32, 96), (64, 64), (30, 90), (50, 52)])
    return Recipe.model_validate(
        {
            "model": str(tiny_model_dir),
            "data": [{"path": str(trained)}],
            "held_out": {"path": str(apart)},
            "resolution": 32,
            "crop": "aspect",
            "steps": 1,
            "out": str(folder / "run"),
        }
    )


@pytest.fixture(scope="module")
def held_out(recipe: Recipe) -> HeldOut:
    found = prepare_recipe(recipe)[1]
    assert found is not None
    return found


def test_the_losses_are_those_of_training_one_picture_at_a_time(held_out: HeldOut) -> None:
    transformer = tiny_transformer()
    found = measure_held_out(transformer, held_out, sigmas=SIGMAS, batch=2)
    losses: dict[str, list[list[float]]] = {"loss": [], "null_loss": []}
    for one in held_out.batches(1):
        assert one.captions[0].startswith("a small green frog")
        for name, text in (("loss", one.text), ("null_loss", held_out.empty_prompt())):
            row = []
            for sigma in SIGMAS:
                noise = paired_noise(one.latents.shape[1:], 0, one.sample_ids[0], sigma)[None]
                loss = flow_matching_loss(transformer, NoisedBatch(one.latents, noise, torch.tensor([sigma]), text))
                row.append(loss.item())
            losses[name].append(row)
    assert found.pictures == 5
    for name, rows in losses.items():
        np.testing.assert_allclose(getattr(found, name).value, np.mean(rows, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.prompt_gain.value, found.null_loss.value - found.loss.value, rtol=1e-9)
    assert (found.slope.low < found.slope.value).all()
    assert (found.slope.value < found.slope.high).all()


def test_batch_and_mode_change_nothing_and_the_model_is_left_as_it_was(held_out: HeldOut) -> None:
    transformer = tiny_transformer().train()
    before = [parameter.clone() for parameter in transformer.parameters()]
    told: list[int] = []
    many = measure_held_out(transformer, held_out, sigmas=SIGMAS, batch=4, on_batch=told.append)
    one = measure_held_out(transformer.eval(), held_out, sigmas=SIGMAS, batch=1)
    assert told == sorted(told)
    assert told[-1] == 5
    assert len(told) < 5
    np.testing.assert_allclose(many.slope.value, one.slope.value, rtol=1e-4)
    np.testing.assert_allclose(many.null_loss.high, one.null_loss.high, rtol=1e-4)
    measure_held_out(transformer.train(), held_out, sigmas=SIGMAS[:1])
    assert transformer.training
    assert torch.is_grad_enabled()
    for parameter, was in zip(transformer.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, was)


def test_a_guidance_embedding_is_fed(held_out: HeldOut) -> None:
    transformer = tiny_transformer(guidance_embeds=True)
    one, four = (measure_held_out(transformer, held_out, sigmas=SIGMAS, guidance=value) for value in (1.0, 4.0))
    assert (one.loss.value != four.loss.value).all()
    with pytest.raises(ModelError, match="needs an embedded guidance"):
        measure_held_out(transformer, held_out, sigmas=SIGMAS)


def test_captions_may_be_encoded_on_the_way(recipe: Recipe, held_out: HeldOut, tmp_path: Path) -> None:
    online = prepare_recipe(recipe.model_copy(update={"text_cache": "none", "cache": str(tmp_path / "cache")}))[1]
    assert online is not None
    transformer = tiny_transformer()
    stored, now = (measure_held_out(transformer, each, sigmas=SIGMAS) for each in (held_out, online))
    assert stored.sigmas == SIGMAS
    np.testing.assert_allclose(now.loss.value, stored.loss.value, rtol=1e-5)
    np.testing.assert_allclose(now.null_slope.value, stored.null_slope.value, rtol=1e-5)


def test_a_measurement_is_plain_json(held_out: HeldOut) -> None:
    broken = tiny_transformer()
    with torch.no_grad():
        broken.proj_out.weight.fill_(torch.nan)
    for transformer in (tiny_transformer(), broken):
        found = measure_held_out(transformer, held_out, sigmas=SIGMAS)
        columns = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert columns["sigmas"] == list(SIGMAS)
        assert columns["pictures"] == 5
        assert all(len(column) == 2 for name, column in columns.items() if name != "pictures")
        assert (columns["slope"][0] is None) == (transformer is broken)

"""`latents: sample`: what is drawn is the VAE's posterior, a function of the visit, and in training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from libreflux.data.batches import Batches
from libreflux.data.crops import View
from libreflux.data.forecast import forecast, needed_bytes
from libreflux.data.held_out import HeldOut
from libreflux.data.order import Unit
from libreflux.data.prepare import prepare_recipe
from libreflux.errors import DataError
from libreflux.files import sha256_file
from libreflux.recipe import Recipe
from tiny import tiny_vae

SIZE = 32
VISITS = 600


def write(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text("a red apple")
    return folder


@pytest.fixture(scope="module")
def tree(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two pictures in two sources each, and one held out."""
    folder = tmp_path_factory.mktemp("posterior")
    source = {"path": str(write(folder / "trained", range(2)))}
    return {
        "model": str(tiny_model_dir),
        "data": [source, {**source, "caption_dropout": 0.0}],
        "held_out": {"path": str(write(folder / "apart", range(2, 3)))},
        "resolution": SIZE,
        "latents": "sample",
        "steps": 1,
        "cache": str(folder / "cache"),
        "out": str(folder / "run"),
    }


@pytest.fixture(scope="module")
def prepared(tree: dict[str, Any]) -> tuple[Batches, HeldOut]:
    batches, held_out = prepare_recipe(Recipe.model_validate(tree))
    assert held_out is not None
    return batches, held_out


def drawn(batches: Batches, item: int, visit: int) -> torch.Tensor:
    return batches.batch(Unit(0, 0, 0, 0, (item,), (visit,), (0,), 1)).latents[0]


def name_of(batches: Batches, item: int) -> str:
    return batches.batch(Unit(0, 0, 0, 0, (item,), (0,), (0,), 1)).sample_ids[0]


def test_visits_have_the_mean_and_the_spread_of_the_vaes_posterior(
    tree: dict[str, Any], prepared: tuple[Batches, HeldOut]
) -> None:
    batches, _ = prepared
    paths = Path(tree["data"][0]["path"]).glob("*.png")
    [path] = [path for path in paths if sha256_file(path)[:32] == name_of(batches, 0)]
    pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        posterior = tiny_vae().encode(pixels.float() / 127.5 - 1).latent_dist
    mean, std = (posterior.mean[0] - 0.1159) * 0.3611, posterior.std[0] * 0.3611
    assert std.std() > 1e-3  # so that one number for all of it would be noticed
    eps = (torch.stack([drawn(batches, 0, visit) for visit in range(VISITS)]) - mean) / std
    # Of 256 standard normal latents: |z| > 4.5 somewhere is less likely than 1 in 500.
    assert (eps.mean(0) * VISITS**0.5).abs().max() < 4.5
    assert ((eps.var(0) - 1) * (VISITS / 2) ** 0.5).abs().max() < 5.5  # chi-squared is skewed
    assert abs(eps.var().item() - 1) < 4.5 * (2 / eps.numel()) ** 0.5
    assert abs((eps[1:] * eps[:-1]).mean().item()) < 4.5 / eps.numel() ** 0.5  # one visit says nothing of the next


def test_a_draw_is_a_function_of_seed_source_picture_and_visit(
    tree: dict[str, Any], prepared: tuple[Batches, HeldOut]
) -> None:
    batches, _ = prepared
    again, _ = prepare_recipe(Recipe.model_validate(tree))
    other, _ = prepare_recipe(Recipe.model_validate({**tree, "seed": 1}))
    mean, _ = prepare_recipe(Recipe.model_validate({**tree, "latents": "mean", "cache": tree["cache"] + "-mean"}))
    first = drawn(batches, 0, 7)
    assert torch.equal(first, drawn(again, 0, 7))
    both = batches.batch(Unit(0, 0, 0, 0, (1, 0), (3, 7), (0, 1), 2))
    assert torch.equal(both.latents[1], first)  # whoever shares the batch
    centre = drawn(mean, 0, 7)
    twin = next(item for item in (2, 3) if name_of(batches, item) == name_of(batches, 0))
    assert torch.equal(centre, drawn(mean, twin, 8))
    eps = [(one - centre).flatten() for one in (first, drawn(batches, 0, 8), drawn(batches, twin, 7))]
    eps += [(drawn(other, 0, 7) - centre).flatten(), (drawn(batches, 1, 7) - drawn(mean, 1, 7)).flatten()]
    close = np.corrcoef(torch.stack(eps).numpy()) - np.eye(5)
    assert np.abs(close).max() < 0.4  # of 256 numbers: 0.0625 is one standard deviation


def test_held_out_pictures_keep_to_the_mean(tree: dict[str, Any], prepared: tuple[Batches, HeldOut]) -> None:
    batches, held_out = prepared
    [batch] = held_out.batches(4)
    stored = batches.cache.latents(held_out.sample_ids[0], View("square", SIZE).name(0, "white"))
    assert torch.equal(batch.latents[0], stored)


def test_a_cache_of_means_and_one_to_sample_from_do_not_mix(tree: dict[str, Any], tmp_path: Path) -> None:
    prepare_recipe(Recipe.model_validate(tree))
    with pytest.raises(DataError, match="made with latents float32 mean and std, now float32; hint: use another cache"):
        prepare_recipe(Recipe.model_validate({**tree, "latents": "mean"}))
    means = {**tree, "latents": "mean", "cache": str(tmp_path / "cache")}
    batches, _ = prepare_recipe(Recipe.model_validate(means))
    with pytest.raises(DataError, match="made with latents float32, now float32 mean and std"):
        prepare_recipe(Recipe.model_validate({**means, "latents": "sample"}))
    with pytest.raises(DataError, match="holds the mean of its latents alone"):
        batches.cache.latent_std(name_of(batches, 0), View("square", SIZE).name(0, "white"))


def test_the_disk_is_asked_for_both(tree: dict[str, Any], prepared: tuple[Batches, HeldOut]) -> None:
    both, text = needed_bytes(Path(tree["model"]), [(SIZE, SIZE)] * 3, ["a red apple"], 512, latents="sample")
    assert (both / 2, text) == needed_bytes(Path(tree["model"]), [(SIZE, SIZE)] * 3, ["a red apple"], 512)
    stored = sum(path.stat().st_size for path in prepared[0].cache.folder.glob("shards/latents-*"))
    assert 0.7 < both / stored < 1.5
    told = [
        forecast(Recipe.model_validate({**tree, "latents": kind}), Path(tree["model"]), 512).cache_bytes
        for kind in ("mean", "sample")
    ]
    assert told[1] - told[0] == 5 / 3 * both / 2  # both sources count: what they share is known to preparing alone

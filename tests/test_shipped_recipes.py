"""The recipes that ship: each loads, says what every line is for, and fits the model that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import T5EncoderModel

from libreflux.adapter.plan import plan
from libreflux.model.facts import Facts, write_facts
from libreflux.model.offload import waiting_bytes
from libreflux.model.single_file import CONFIGS
from libreflux.recipe import load_recipe
from libreflux.training import trace
from libreflux.training.estimate import estimate_recipe
from libreflux.training.memory_plan import needed

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MILLIONS = {
    "flux-12gb-style.yaml": 35.5,
    "flux-16gb-free.yaml": 597.7,
    "flux-24gb-free.yaml": 597.7,
    "flux-24gb-style.yaml": 35.5,
    "flux-80gb-stage-2.yaml": 3226.8,
    "flux-8xh100.yaml": 3226.8,
}
FLUX = [path for path in RECIPES if path.name.startswith("flux")]


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    """FLUX.1-schnell at full size, without memory."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid_and_survives_its_own_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert recipe.save.every % recipe.ema_every == 0  # else a checkpoint's averages are of an earlier step


@pytest.mark.parametrize("path", FLUX, ids=lambda path: path.name)
def test_adapters_for_flux_have_the_size_that_their_comment_says(path: Path, flux: nn.Module) -> None:
    rows = plan(load_recipe(path).adapter, flux).layers
    millions = sum(row.parameters for row in rows) / 1e6
    assert millions == pytest.approx(MILLIONS[path.name], abs=0.05)
    assert f"{MILLIONS[path.name]:,.1f} M" in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-schnell's configuration files alone."""
    folder = tmp_path_factory.mktemp("flux") / "schnell"
    for part in ("text_encoder", "text_encoder_2", "vae"):
        (folder / part).mkdir(parents=True)
        shutil.copy(CONFIGS / f"{part}.json", folder / part / "config.json")
    (folder / "transformer").mkdir()
    config = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": False}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text("{}")
    write_facts(folder, Facts(max_tokens=512))
    return folder


# The T5 of older transformers, such as 5.6, has no SDPA: the scores of its attention lie in memory.
CAPTIONS = 10.5 if getattr(T5EncoderModel, "_supports_sdpa", False) else 12.9
GIB = {  # by phase, for prompts of 512 tokens on a card
    "flux-12gb-style.yaml": [1.2, CAPTIONS - 10.5 + 4.4, 10.1, 10.1],  # T5 block by block
    "flux-16gb-free.yaml": [3.5, CAPTIONS, 13.5, 12.2, 8.6],
    "flux-24gb-free.yaml": [3.5, CAPTIONS, 19.7, 18.4, 14.8],
    "flux-24gb-style.yaml": [1.2, CAPTIONS, 12.8, 12.8],
    "flux-80gb-stage-2.yaml": [3.5, CAPTIONS, 49.0, 33.1, 29.5],
    "flux-8xh100.yaml": [3.5, CAPTIONS, 60.0, 44.1, 41.0],
}
SMALL = {"flux-12gb-style.yaml": (12, 17), "flux-16gb-free.yaml": (16, 35)}
"""GiB of the card, of which 2 % are the driver's, and how many of 57 blocks wait in RAM beside it."""
FITS = {
    **{name: 0.98 * card for name, (card, _) in SMALL.items()},
    "flux-24gb-free.yaml": 23,
    "flux-24gb-style.yaml": 15,
    "flux-80gb-stage-2.yaml": 57,
    "flux-8xh100.yaml": 70,
}
"""GiB that hold the peak and what the allocator reserves with it."""


@pytest.mark.parametrize("path", FLUX, ids=lambda path: path.name)
def test_memory_is_estimated_to_fit_in_every_phase(
    path: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = estimate_recipe(load_recipe(path, [f"model={flux_folder}"]), text_tokens=512)
    if path.name in SMALL:
        card, waiting = SMALL[path.name]
        assert needed(found, 0.98 * card * 2**30) == waiting
        assert f"on {card} GB some {waiting} of 57 blocks wait" in path.read_text(encoding="utf-8")
        assert found.reserved > 0.98 * card * 2**30  # it would not fit without
        found = found.offloaded(waiting)
    print(found.table())
    assert [phase.peak / 2**30 for phase in found.phases] == pytest.approx(GIB[path.name], abs=0.051)
    assert found.reserved < FITS[path.name] * 2**30
    assert f"T5 and CLIP in {'fp32' if '12gb' in path.name else 'bf16'}" in found.phases[1].name
    pinned = 2 ** (found.adapter - 1).bit_length()  # torch rounds it up to a power of two
    assert found.host == found.averages + pinned + waiting_bytes(found.blocks, found.waiting)
    assert (found.waiting > 0) == (path.name in SMALL)


def test_training_on_a_card_is_estimated_as_it_was_measured(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """19.70 GiB on an H200 (torch 2.11): flux-24gb-free on pictures of 1280 x 816, captions of some 50 tokens."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = next(path for path in FLUX if path.name == "flux-24gb-free.yaml")
    changes = [f"model={flux_folder}", "samples={every: 0}", "held_out={share: 0}"]
    found = estimate_recipe(load_recipe(path, changes), text_tokens=50)
    kept = trace.weights_of(
        trace.meta_vae(json.loads((CONFIGS / "vae.json").read_text()))
    )  # it stayed on the card then
    assert (found.training.peak + kept) / 2**30 == pytest.approx(19.70, abs=0.05)


def test_every_recipe_is_here() -> None:
    assert {path.name for path in FLUX} == set(MILLIONS)
    assert len(RECIPES) > len(FLUX)

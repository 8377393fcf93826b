"""Models that see their padding: FLUX.1 as diffusers draws it, LibreFLUX as its weights were trained."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from libreflux.model.family import Model, open_model
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.sample.noise import noise
from libreflux.sample.pipeline import LibreFluxPipeline

PROMPTS = ["a fox", "a small green frog sits under a tall tree"]


@pytest.fixture
def keeping(model: Model) -> LibreFluxPipeline:
    made = LibreFluxPipeline.from_model(model)
    made.set_progress_bar_config(disable=True)
    made.facts = dataclasses.replace(model.facts, text_padding="keep", max_tokens=24, shift=1.0)
    return made


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_keep_is_what_diffusers_draws(keeping: LibreFluxPipeline, tiny_model_dir: Path, guidance: float) -> None:
    theirs = FluxPipeline.from_pretrained(tiny_model_dir)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    start = pack(noise([1, 2], 16, 4, 4))
    same = {"height": 32, "width": 32, "num_inference_steps": 3, "latents": start, "output_type": "latent"}
    expected = theirs(
        PROMPTS, negative_prompt=["a tree"] * 2, true_cfg_scale=guidance, max_sequence_length=24, **same
    ).images
    ours = keeping(PROMPTS, "a tree", guidance_scale=guidance, **same).images
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(pack(ours), expected, atol=1e-4, rtol=0)


def test_bias_adds_one_to_the_logits_of_what_is_not_padding(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.transformer is not None and model.text is not None
    text = model.text.encode(PROMPTS, padding="bias", max_tokens=24)
    assert text.favoured is not None and len(set(text.favoured)) == 2
    x, sigma, ids = pack(noise([1, 2], 16, 4, 4)), torch.tensor([0.3, 0.8]), image_ids(4, 4)
    with torch.no_grad():
        ours = velocity(model.transformer, x, sigma, text, ids)
        kept = TextConditioning(text.tokens, text.pooled)
        without = velocity(model.transformer, x, sigma, kept, ids)

        def plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            assert options.get("attn_mask") is None
            logits = query @ key.mT / query.shape[-1] ** 0.5
            for row, own in enumerate(text.favoured or ()):
                logits[row, ..., :own] += 1
                logits[row, ..., 24:] += 1
            return logits.softmax(-1) @ value

        monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
        reference = velocity(model.transformer, x, sigma, kept, ids)
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=0)
    assert (ours - without).abs().max() > 1e-4


@pytest.mark.parametrize(("weights", "autocast"), [
    (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)
])  # fmt: skip
def test_the_bias_is_in_the_dtype_of_the_queries(
    model: Model, monkeypatch: pytest.MonkeyPatch, weights: torch.dtype, autocast: bool
) -> None:
    assert model.transformer is not None and model.text is not None
    text = model.text.encode(PROMPTS, padding="bias", max_tokens=24)
    x, sigma, ids = pack(noise([1, 2], 16, 4, 4)), torch.tensor([0.3, 0.8]), image_ids(4, 4)
    attention, calls = F.scaled_dot_product_attention, []

    def seen(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        assert {one.dtype for one in (query, key, value, attn_mask)} == {torch.bfloat16}
        calls.append(attn_mask.flatten(1).float())
        return attention(query, key, value, attn_mask=attn_mask, **options)

    with torch.no_grad():
        exact = velocity(model.transformer, x, sigma, text, ids)
        monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            rounded = velocity(copy.deepcopy(model.transformer).to(weights), x, sigma, text, ids)
    wanted = torch.ones(2, 24 + 4)
    for row, own in zip(wanted, text.favoured or (), strict=True):
        row[own:24] = 0
    assert len(calls) == 3 and all(torch.equal(mask, wanted) for mask in calls)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.03 * float(exact.abs().max()), rtol=0)


def test_the_published_layout_is_drawn_without_its_code(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "LibreFLUX"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "libreflux.json").unlink()
    for name, change in (
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModelWithMasking"}),
        ("model_index.json", {"_class_name": ["pipeline", "LibreFluxPipeline"],
                              "transformer": ["transformer", "FluxTransformer2DModelWithMasking"]}),
    ):  # fmt: skip
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for code in ("pipeline.py", "transformer/transformer.py"):
        (folder / code).write_text("raise SystemExit('run')")
    opened = open_model(folder)
    assert (opened.facts.text_padding, opened.facts.max_tokens, opened.facts.guidance) == ("bias", 512, 3.5)
    pipe = LibreFluxPipeline.from_model(opened)
    pipe.set_progress_bar_config(disable=True)
    two, alone = (pipe(prompts, seeds=[5] * len(prompts), num_inference_steps=2, output_type="latent").images
                  for prompts in (PROMPTS, PROMPTS[:1]))  # fmt: skip
    torch.testing.assert_close(two[:1], alone, atol=1e-5, rtol=0)

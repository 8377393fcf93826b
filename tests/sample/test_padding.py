"""Models that see their padding: FLUX.1 as diffusers draws it, LibreFLUX as its weights were trained."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from libreflux.model.facts import KNOWN
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.sample.noise import noise
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import Opened, opened, tensor_of
from tiny import make_published_layout

PROMPTS = ["a fox", "a small green frog sits under a tall tree"]


@pytest.fixture
def keeping(model: Opened) -> LibreFluxPipeline:
    made = model.pipeline()
    made.set_progress_bar_config(disable=True)
    made.facts = dataclasses.replace(model.facts, text_padding="keep", max_tokens=24, shift=1.0)
    return made


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_keep_is_what_diffusers_draws(keeping: LibreFluxPipeline, tiny_model_dir: Path, guidance: float) -> None:
    theirs = FluxPipeline.from_pretrained(tiny_model_dir)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    start = pack(noise([1, 2], 16, 4, 4))
    same: dict[str, Any] = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "latents": start,
        "output_type": "latent",
    }
    expected = theirs(
        PROMPTS, negative_prompt=["a tree"] * 2, true_cfg_scale=guidance, max_sequence_length=24, **same
    ).images
    ours = tensor_of(keeping(PROMPTS, "a tree", guidance_scale=guidance, **same))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(pack(ours), expected, atol=1e-4, rtol=0)


class PlainBias:
    """Attention written out: 1 on the logits of each row's own tokens and of the image, whatever the mask that came."""

    def __init__(self, own: list[int], width: int) -> None:
        self.own, self.width, self.calls = own, width, 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        assert options.get("attn_mask") is None
        logits = query @ key.mT / query.shape[-1] ** 0.5
        for row, own in enumerate(self.own):
            logits[row, ..., :own] += 1
            logits[row, ..., self.width :] += 1
        return logits.softmax(-1) @ value


def check_bias(model: Opened, text: TextConditioning) -> None:
    """`velocity` is that of a transformer that was given the padded text without a mask, under `PlainBias`."""
    assert model.transformer is not None
    assert text.favoured is not None
    assert len(set(text.favoured)) == 2
    x, sigma, ids = pack(noise([1, 2], 16, 4, 4)), torch.tensor([0.3, 0.8]), image_ids(4, 4)
    plain = PlainBias(text.favoured, text.lengths[0])
    given = {
        "hidden_states": x,
        "encoder_hidden_states": torch.stack(text.tokens),
        "pooled_projections": text.pooled,
        "timestep": sigma,
        "img_ids": ids,
        "txt_ids": torch.zeros(text.lengths[0], 3),
        "return_dict": False,
    }
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        ours = velocity(model.transformer, x, sigma, text, ids)
        (without,) = model.transformer(**given)
        patch.setattr(F, "scaled_dot_product_attention", plain)
        (reference,) = model.transformer(**given)
    assert plain.calls == 3  # 1 double, 2 single blocks
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=0)
    assert (ours - without).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("weights", "autocast"), [(torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_the_bias_is_in_the_dtype_of_the_queries(
    model: Opened, monkeypatch: pytest.MonkeyPatch, weights: torch.dtype, autocast: bool
) -> None:
    assert model.transformer is not None
    assert model.text is not None
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
    assert len(calls) == 3
    assert all(torch.equal(mask, wanted) for mask in calls)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.03 * float(exact.abs().max()), rtol=0)


def test_bias_adds_one_to_the_logits_of_what_is_not_padding(model: Opened) -> None:
    check_bias(model, model.text.encode(PROMPTS, padding="bias", max_tokens=24))


def test_the_published_layout_is_drawn_without_its_code(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_published_layout(tiny_model_dir, tmp_path / "LibreFLUX")
    assert len(list((folder / "transformer").glob("*-of-00003.safetensors"))) == 3
    found = opened(folder)
    assert found.facts == KNOWN["jimmycarter/LibreFLUX"]
    assert found.facts.text_padding == "bias"
    assert f"{folder} has no libreflux.json: taken for a model like LibreFLUX" in caplog.text
    pipe = found.pipeline()
    pipe.set_progress_bar_config(disable=True)
    text = pipe.encode_prompt(PROMPTS)
    assert text.lengths == [512, 512]
    check_bias(found, text)
    two, alone = (
        tensor_of(pipe(prompts, seeds=[5] * len(prompts), num_inference_steps=2, output_type="pt"))
        for prompts in (PROMPTS, PROMPTS[:1])
    )
    assert two.shape == (2, 3, 32, 32)
    assert (two[0] - two[1]).abs().max() > 1e-3
    torch.testing.assert_close(two[:1], alone, atol=1e-5, rtol=0)

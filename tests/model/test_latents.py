"""Latents: FLUX's normalisation and packing, against their definitions and diffusers' own pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from libreflux.errors import ModelError
from libreflux.model.latents import decode, encode, image_ids, pack, stride, unpack
from tiny import tiny_vae


def test_channel_index_is_c4_ph2_pw() -> None:
    latents = torch.randn(2, 3, 4, 6)
    packed = pack(latents)
    assert packed.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            for c in range(3):
                for ph in range(2):
                    for pw in range(2):
                        got = packed[:, row * 3 + column, c * 4 + ph * 2 + pw]
                        assert torch.equal(got, latents[:, c, 2 * row + ph, 2 * column + pw])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_unpack_is_the_inverse_and_diffusers_agrees(batch: int, channels: int, rows: int, columns: int) -> None:
    latents = torch.randn(batch, channels, 2 * rows, 2 * columns)
    packed = pack(latents)
    assert torch.equal(unpack(packed, 2 * rows, 2 * columns), latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, batch, channels, 2 * rows, 2 * columns))
    theirs = FluxPipeline._unpack_latents(packed, 16 * rows, 16 * columns, vae_scale_factor=8)
    assert torch.equal(theirs, latents)
    ids = FluxPipeline._prepare_latent_image_ids(batch, rows, columns, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(2 * rows, 2 * columns), ids)


def test_odd_sides_are_refused() -> None:
    with pytest.raises(ModelError, match="odd side"):
        pack(torch.zeros(1, 16, 4, 3))


def test_encode_is_the_normalised_mean() -> None:
    vae = tiny_vae()
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = encode(vae, pixels)
    assert latents.shape == (2, 16, 4, 6)
    assert stride(vae) == 8
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents, (posterior.mean - 0.1159) * 0.3611)
    assert torch.equal(encode(vae, pixels), latents)  # nothing is drawn
    assert (posterior.sample() - posterior.mean).abs().max() > 1e-3


def test_decode_undoes_the_normalisation() -> None:
    vae = tiny_vae()
    latents = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latents / 0.3611 + 0.1159).sample
    torch.testing.assert_close(decode(vae, latents), expected)


def test_a_vae_without_shift_and_scale() -> None:
    vae = tiny_vae()
    vae.register_to_config(shift_factor=None, scaling_factor=None)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encode(vae, pixels), vae.encode(pixels).latent_dist.mean)
        torch.testing.assert_close(decode(vae, torch.ones(1, 16, 2, 2)), vae.decode(torch.ones(1, 16, 2, 2)).sample)


def test_a_bf16_vae_takes_fp32_pixels() -> None:
    vae = tiny_vae().to(torch.bfloat16)
    assert decode(vae, encode(vae, torch.zeros(1, 3, 16, 16)).float()).dtype == torch.bfloat16

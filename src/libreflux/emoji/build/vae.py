"""Stage 1: the emoji AutoencoderKL: 16 channels, ÷8, no attention; 64 px crops first, whole pictures at the end.

After `encoder` the encoder is frozen (latents are made from it); `decoder` goes on with the decoder alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from libreflux import seeding
from libreflux.emoji import compose
from libreflux.emoji.build.stage import Stage, cosine

CROP_STEPS, WHOLE_STEPS = 1200, 500
DECODER_STEPS = 1500
MATRIX_RATE = 6e-3  # of Muon
EDGE = ("conv_in", "conv_out")
CROP_BATCH, WHOLE_BATCH = 32, 8
LATENT_STD = 0.05  # of the posterior, in units of the raw latents: the noise the decoder is trained to forgive


def make() -> AutoencoderKL:
    """The autoencoder, its posterior's standard deviation fixed at `LATENT_STD`."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=compose.SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = 2 * np.log(LATENT_STD)
    return vae


def pictures(seed: int, indices: range, crop: int | None = None, pairs: float = 0.3) -> Tensor:
    """[B, 3, H, W] in [-1, 1], channels last: composed pictures, or one random crop of `crop` px of each."""
    out = []
    for index in indices:
        picture = np.asarray(compose.render(compose.scene(seed, index, pairs=pairs)))
        if crop:
            y, x = seeding.rng(seed, "vae-crop", index).integers(compose.SIDE - crop + 1, size=2)
            picture = picture[y : y + crop, x : x + crop]
        out.append(picture)
    pixels = torch.from_numpy(np.stack(out)).float().div_(127.5).sub_(1)
    return rearrange(pixels, "b h w c -> b c h w").contiguous(memory_format=torch.channels_last)


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    """L1 plus L1 of the finite differences at three scales, and a little squared error (what PSNR measures)."""
    loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
    for _ in range(3):
        loss = loss + 0.5 * sum(F.l1_loss(a, b) for a, b in zip(_edges(output), _edges(target), strict=True))
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return loss


def loss_at(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], step: int, seed: int) -> Tensor:
    whole = step >= CROP_STEPS
    batch = WHOLE_BATCH if whole else CROP_BATCH
    pixels = pictures(seed, range(step * 64, step * 64 + batch), None if whole else 64)
    with torch.autocast("cpu", torch.bfloat16):
        mean = encode(pixels)[:, :16].float()
        noise = torch.randn(mean.shape, generator=seeding.generator(seed, "vae-noise", step))
        output = decode(mean + LATENT_STD * noise).float()
    return reconstruction(output, pixels) + 1e-3 * mean.square().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, count: int = 200, seed: int = 1, pairs: float = 1.0) -> float:
    """Mean PSNR in dB (8-bit range, after rounding to pixels) over pictures of two subjects each.

    Of the 1.1 million such pictures training draws 14,000, so these are held out; most pictures of one are not.
    """
    total = 0.0
    for start in range(0, count, 20):
        pixels = pictures(seed, range(start, start + 20), pairs=pairs)
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        error = ((output - pixels) * 127.5).round().square().mean(dim=(1, 2, 3))
        total += (10 * torch.log10(255**2 / error.clamp_min(1e-9))).sum().item()
    return total / count


@torch.no_grad()
def fit_scale(vae: AutoencoderKL, count: int = 400, seed: int = 2) -> None:
    """Set `shift_factor` and `scaling_factor` so that normalised latents have mean 0 and standard deviation 1."""
    means = [vae.encode(pictures(seed, range(i, i + 20))).latent_dist.mean for i in range(0, count, 20)]
    latents = torch.cat(means)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train(work: Path, *, seed: int = 0, decoder_steps: int = 0) -> AutoencoderKL:
    """Train (or resume) and return the averaged autoencoder in fp32; `work/vae.safetensors` keeps the state."""
    vae = make().to(memory_format=torch.channels_last)
    encode, decode = torch.compile(vae.encoder), torch.compile(vae.decoder)
    stage = Stage(work / "vae.safetensors", {"vae": vae}, lr=2e-3, matrix_lr=MATRIX_RATE, average=0.99, edge=EDGE)
    stage.resume()
    for _ in stage.run(CROP_STEPS + WHOLE_STEPS, lambda step: loss_at(encode, decode, step, seed), cosine, every=100):
        pass
    stage.use_average()
    if decoder_steps:
        vae.encoder.requires_grad_(False)
        file, parts = work / "vae-decoder.safetensors", {"decoder": vae.decoder}
        refine = Stage(file, parts, lr=1e-3, matrix_lr=MATRIX_RATE / 2, average=0.998, edge=EDGE)
        refine.resume()
        after = CROP_STEPS
        for _ in refine.run(
            decoder_steps, lambda step: loss_at(encode, decode, after + step, seed + 7), cosine, every=100
        ):
            pass
        refine.use_average()
    return vae


def reached(work: Path) -> int:
    """Steps that the decoder stage has behind it; 0 before it."""
    return int(_metadata(work / "vae-decoder.safetensors", "step", 0))


def scale_of(work: Path) -> dict[str, float]:
    """`shift_factor` and `scaling_factor` as the latents were made with."""
    file = work / "latents.safetensors"
    return {"shift_factor": _metadata(file, "shift", 0.0), "scaling_factor": _metadata(file, "scale", 1.0)}


def _metadata(file: Path, key: str, default: float) -> float:
    from safetensors import safe_open

    if not file.exists():
        return default
    with safe_open(file, "pt") as saved:
        return float(saved.metadata()[key])

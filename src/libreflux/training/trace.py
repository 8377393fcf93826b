"""What is alive at the peak of a pass, found without numbers: the pass runs on torch's meta device.

There operations find shapes and compute nothing. What is alive is counted storage by storage: what an adapter, a
mask, an int8 base or checkpointing keeps for backward is found, not assumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from libreflux.model import latents as latent_space
from libreflux.model.fused_attention import fuse_attention
from libreflux.model.text import TOKENS_PER_PASS, TextConditioning
from libreflux.training.live_bytes import LiveBytes
from libreflux.training.objective import NoisedBatch, flow_matching_loss


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors' numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return size_in_bytes([*module.parameters(), *module.buffers()])


def meta_transformer(config: dict[str, Any], dtype: torch.dtype) -> FluxTransformer2DModel:
    """A transformer of this configuration whose weights take no memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    nn.Module.to(transformer, dtype)  # diffusers' own `to` warns of modules to keep in fp32; FLUX has none
    fuse_attention(transformer)
    return transformer.eval()


def meta_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """A VAE of this configuration in fp32, as it encodes and decodes, whose weights take no memory."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    nn.Module.to(vae, torch.float32)
    return vae.eval()


def meta_encoders(
    clip: Mapping[str, Any], t5: Mapping[str, Any], dtype: torch.dtype
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP and T5 of these configurations, whose weights take no memory."""
    with torch.device("meta"):
        made = CLIPTextModel(CLIPTextConfig.from_dict(dict(clip))), T5EncoderModel(T5Config.from_dict(dict(t5)))
    for encoder in made:
        nn.Module.to(encoder, dtype)
        encoder.eval()
    return made


def trace_pass(
    transformer: FluxTransformer2DModel,
    batch: int,
    latent_size: tuple[int, int],
    text_tokens: int,
    guidance: float | None = None,
    *,
    backward: bool = True,
    learn: Callable[[NoisedBatch], object] | None = None,
) -> int:
    """Peak bytes that one pass of an adapted meta transformer over a batch, loss included, has alive at a time.

    Args:
        transformer: on the meta device.
        batch: pictures.
        latent_size: (h, w).
        text_tokens: of each prompt.
        guidance: for a model with a guidance embedding.
        backward: whether a backward pass follows; without, no gradient is recorded, as when pictures are measured.
        learn: what a pass does instead of plain flow matching, its backward passes included.
    """
    config = transformer.config
    latents = torch.empty(batch, config.in_channels // 4, *latent_size, device="meta")
    dtype = next(parameter.dtype for name, parameter in transformer.named_parameters() if "norm_q" in name)
    text = TextConditioning(
        [torch.empty(text_tokens, config.joint_attention_dim, device="meta", dtype=dtype) for _ in range(batch)],
        torch.empty(batch, config.pooled_projection_dim, device="meta", dtype=dtype),
    )
    sigma = torch.empty(batch, device="meta")
    noised = NoisedBatch(latents, torch.empty_like(latents), sigma, text, guidance)
    blocks = contextlib.nullcontext() if backward else _one_of_like_blocks(transformer)
    with blocks, torch.set_grad_enabled(backward), attention_in_tiles(), LiveBytes() as live:
        if learn is not None:
            learn(noised)
        else:
            losses = flow_matching_loss(transformer, noised)
            if backward:
                losses.sum().backward()
    for parameter in transformer.parameters():
        parameter.grad = None
    return live.peak


@contextlib.contextmanager
def _one_of_like_blocks(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Without gradient a block leaves its result alone, so one of several like blocks has the peak of all."""
    whole = {name: getattr(transformer, name) for name in ("transformer_blocks", "single_transformer_blocks")}
    try:
        for name, blocks in whole.items():
            distinct = {
                tuple((key, tensor.shape, tensor.dtype) for key, tensor in block.state_dict().items()): block
                for block in blocks
            }
            setattr(transformer, name, nn.ModuleList(distinct.values()))
        yield
    finally:
        for name, blocks in whole.items():
            setattr(transformer, name, blocks)


def trace_encode(vae: AutoencoderKL, size: tuple[int, int], *, sample: bool) -> int:
    """Peak bytes beside the weights while a meta VAE encodes one crop.

    Args:
        vae: see `meta_vae`.
        size: (width, height) in pixels.
        sample: whether the standard deviation is wanted too, see `latents.posterior`.
    """
    encode: Callable[..., object] = latent_space.posterior if sample else latent_space.encode
    with attention_in_tiles(), LiveBytes() as live:
        pixels = torch.empty(1, int(vae.config.in_channels), size[1], size[0], device="meta")
        encode(vae, pixels)
    return live.peak


def trace_decode(vae: AutoencoderKL, side: int) -> int:
    """Peak bytes beside the weights while a meta VAE decodes one square picture of `side` pixels, in tiles if large."""
    latents = torch.empty(1, int(vae.config.latent_channels), *[side // latent_space.stride(vae)] * 2, device="meta")
    vae.use_tiling = side > latent_space.TILE_ABOVE
    with attention_in_tiles(), LiveBytes() as live:
        pixels = latent_space.decode(vae, latents).float()
        (pixels / 2 + 0.5).clamp(0, 1)
    return live.peak


def trace_text(clip: CLIPTextModel, t5: T5EncoderModel, captions: int, tokens: int) -> int:
    """Peak bytes beside the weights while meta encoders encode captions of equal length, the results included.

    Args:
        clip, t5: see `meta_encoders`.
        captions: that are encoded before any result leaves the device.
        tokens: of each caption for T5.
    """
    device = torch.device("meta")
    at_once = min(captions, max(1, TOKENS_PER_PASS // tokens))
    with torch.no_grad(), attention_in_tiles(), LiveBytes() as live:
        done: list[Tensor] = []
        while captions - len(done) > 0:
            ids = torch.zeros(min(at_once, captions - len(done)), tokens, dtype=torch.long, device=device)
            done += [row.clone() for row in t5(input_ids=ids).last_hidden_state]
        longest = int(clip.config.max_position_embeddings)
        clip(input_ids=torch.zeros(captions, longest, dtype=torch.long, device=device))
    return live.peak


@contextlib.contextmanager
def attention_in_tiles() -> Iterator[None]:
    """Attention that keeps its inputs, its output and a logarithm per row, as fused kernels do on CPU and CUDA."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        out: Tensor = _TiledAttention.apply(query, key, value)
        return out

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])

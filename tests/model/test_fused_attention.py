"""The fused attention processor beside diffusers' own: equal bits forward, gradients equal to rounding."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from libreflux.adapter.adapter import attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.model.fused_attention import FusedAttnProcessor, fuse_attention, norm_and_rotate, plain_norm_and_rotate
from libreflux.model.numerics import enable_checkpointing
from libreflux.model.opening import open_model
from model.random_inputs import run
from tiny import tiny_transformer


def processors(transformer: nn.Module) -> set[type]:
    return {type(module.processor) for module in transformer.modules() if isinstance(module, FluxAttention)}


def random_norms(transformer: FluxTransformer2DModel, dtype: torch.dtype) -> FluxTransformer2DModel:
    """In `dtype`, with norm weights that are not all one."""
    generator = torch.Generator().manual_seed(9)
    for module in transformer.modules():
        if isinstance(module, nn.RMSNorm):
            assert isinstance(module.weight, Tensor)
            module.weight.data = 1 + 0.3 * torch.randn(module.weight.shape, generator=generator)
    return transformer.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_is_diffusers_to_the_bit(dtype: torch.dtype) -> None:
    """Of both kinds of block, with a mask: the two prompts have unequal lengths."""
    plain = random_norms(tiny_transformer(), dtype)
    fused = copy.deepcopy(plain)
    fuse_attention(fused)
    assert processors(fused) == {FusedAttnProcessor}
    with torch.no_grad():
        wanted = run(plain)
        assert run(fused).equal(wanted)
    assert wanted.isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_diffusers_gradients(checkpointing: bool) -> None:
    found = []
    for fuse in (False, True):
        transformer = random_norms(tiny_transformer(), torch.float32)
        if fuse:
            fuse_attention(transformer)
        if checkpointing:
            enable_checkpointing(transformer.train())
        rows = resolve(linear_shapes(transformer), [Target(layers="**.attn.**", factor=2)])
        adapter = attach(transformer, rows, init="kaiming")
        run(transformer).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in adapter.named_parameters()})
    assert found[0]
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-7, msg=lambda told: f"{name}: {told}")  # noqa: B023


def inputs(dtype: torch.dtype) -> tuple[list[tuple[Tensor, nn.RMSNorm]], Tensor, Tensor]:
    """Text and image of two samples, 3 heads of 8, queries before keys; and the rotation of 12 tokens."""
    generator = torch.Generator().manual_seed(4)
    parts = []
    for length in (5, 7, 5, 7):
        norm = nn.RMSNorm(8, eps=1e-6).to(dtype).requires_grad_(False)
        norm.weight.copy_(1 + 0.3 * torch.randn(8, generator=generator))
        parts.append((torch.randn(2, length, 3, 8, generator=generator, dtype=torch.float32).to(dtype), norm))
    angle = torch.rand(12, 4, generator=generator).mul_(6).repeat_interleave(2, dim=1)
    return parts, angle.cos(), angle.sin()


def test_the_step_is_its_plain_twin() -> None:
    parts, cos, sin = inputs(torch.bfloat16)
    x = torch.cat([part for part, _ in parts], dim=1).unflatten(1, (2, 12))
    weight = torch.cat([norm.weight.expand(part.shape[1], -1) for part, norm in parts]).view(2, 12, 1, 8)
    assert norm_and_rotate(parts, cos, sin).equal(plain_norm_and_rotate(x, weight, cos, sin, 1e-6))


def test_the_gradient_is_that_of_the_plain_twin() -> None:
    """By fp64, which the twin computes in fp32: a gradient written by hand must not be off by more."""
    parts, cos, sin = inputs(torch.float32)
    leaves = [part.requires_grad_() for part, _ in parts]
    upstream = torch.randn(2, 2, 12, 3, 8, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(norm_and_rotate(parts, cos, sin), leaves, upstream)
    x = torch.cat(leaves, dim=1).unflatten(1, (2, 12))
    weight = torch.cat([norm.weight.expand(part.shape[1], -1) for part, norm in parts]).view(2, 12, 1, 8)
    wanted = torch.autograd.grad(plain_norm_and_rotate(x, weight, cos, sin, 1e-6), leaves, upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_it_does_not_know_is_left_to_diffusers() -> None:
    """Trained norms get their gradient; fused projections and autocast give what diffusers gives."""
    cases: list[Any] = [
        lambda model: model.get_submodule("single_transformer_blocks.0.attn.norm_q").requires_grad_(True),
        lambda model: model.fuse_qkv_projections(),
    ]
    for change in cases:
        plain = random_norms(tiny_transformer(), torch.float32)
        fused = copy.deepcopy(plain)
        fuse_attention(fused)
        for model in (plain, fused):
            change(model)
        assert run(fused).equal(run(plain))
    trained = random_norms(tiny_transformer(), torch.float32)
    fuse_attention(trained)
    cases[0](trained)
    run(trained).mean().backward()
    weight = trained.get_submodule("single_transformer_blocks.0.attn.norm_q").weight
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert run(fused).equal(run(plain))


@pytest.mark.parametrize("adapter", [None, "lokr", "lora"])
def test_weights_that_hooks_bring_are_not_read_past_them(adapter: str | None) -> None:
    """accelerate's hooks leave weights on meta until their module is called; norms, LoKr and LoRA among them."""
    made = random_norms(tiny_transformer(), torch.float32)
    if adapter is not None:
        target = Target(layers="**.attn.**", factor=2) if adapter == "lokr" else Target(layers="**.attn.**", rank=2)
        attach(made, resolve(linear_shapes(made), [target]), init="kaiming")
        for name, parameter in made.named_parameters():
            if "lora_up" in name or "lokr_w2" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(3))
        made.requires_grad_(False)
    with torch.no_grad():
        plain = run(made)
        fuse_attention(made)
        assert run(made).equal(plain)
        accelerate.cpu_offload(made, torch.device("cpu"))
        assert made.get_submodule("single_transformer_blocks.0.attn.norm_q").get_parameter("weight").is_meta
        assert run(made).equal(plain)


def test_another_processor_stays() -> None:
    class Mine(FluxAttnProcessor):
        pass

    transformer = tiny_transformer()
    transformer.set_attn_processor(Mine())
    fuse_attention(transformer)
    assert processors(transformer) == {Mine}


def test_a_model_that_is_opened_has_it() -> None:
    assert processors(open_model("emoji-base").load_transformer()) == {FusedAttnProcessor}

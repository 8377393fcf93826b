"""Features of blocks, and networks that are switched off in part while a gradient passes through them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from libreflux.adapter.adapter import Adapter
from libreflux.errors import ModelError
from libreflux.model import numerics
from libreflux.model.compiling import CompiledBlocks
from libreflux.model.features import image_features
from libreflux.model.latents import image_ids, pack
from libreflux.model.offload import BlockOffload
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from model.bases import adapted, based

TEXT = TextConditioning(
    [torch.linspace(-1, 1, 24 * n).view(n, 24) for n in (3, 5)], torch.linspace(-1, 1, 32).view(2, 16)
)


def latents() -> Tensor:
    return pack(torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1)))


def run(transformer: Any, x: Tensor) -> Tensor:
    return velocity(transformer, x, torch.tensor([0.3, 0.8]), TEXT, image_ids(4, 6))


def test_features_are_what_blocks_return_for_the_image() -> None:
    """The contract with diffusers: both kinds of block return (text, image)."""
    transformer = based("fp32")
    seen: list[Tensor] = []
    transformer.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), image_features(transformer, (0, 2)) as found:
        run(transformer, latents())
    assert {number: tuple(one.shape) for number, one in found.items()} == {0: (2, 6, 32), 2: (2, 6, 32)}
    assert torch.equal(found[2], seen[0])  # behind the last block nothing but the head of the network follows
    with torch.no_grad(), image_features(transformer, (2,)) as again:
        run(transformer, latents() + 1)
    assert not torch.equal(again[2], found[2])
    assert list(again) == [2]
    assert not any(
        block._forward_hooks for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    )
    with pytest.raises(ModelError, match="no block 3"), image_features(transformer, (3,)):
        pass


def gradient(transformer: Any, adapter: Adapter | None, blocks: tuple[int, ...] = (0, 1)) -> Tensor:
    """Of features by the input, through the base alone; backward runs when the adapter is on again."""
    x = latents().requires_grad_()
    if adapter is None:
        with image_features(transformer, blocks) as found:
            run(transformer, x)
    else:
        with adapter.disabled(), image_features(transformer, blocks) as found:
            run(transformer, x)
    sum(one.float().square().mean() for one in found.values()).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "w8a8"])
def test_a_gradient_through_the_switched_off_adapter_is_that_of_a_copy_of_the_base(base: str) -> None:
    copied = based(base)
    transformer = copy.deepcopy(copied)
    adapter = adapted(transformer)
    wanted = gradient(copied, None)
    assert wanted.abs().max() > 0
    assert torch.equal(gradient(transformer, adapter), wanted)
    for kept in ((), (0,), (0, 1)):
        blocks = [transformer.transformer_blocks[0], *transformer.single_transformer_blocks]
        numerics.enable_checkpointing(transformer, [blocks[number] for number in kept])
        assert torch.equal(gradient(transformer, adapter), wanted)
    assert all(layer.enabled for layer in adapter.layers.values())


def test_what_was_on_stays_on_in_a_backward_pass_while_it_is_off() -> None:
    """And diffusers' own checkpointing is replaced by ours."""
    transformer = based("fp32")
    adapter = adapted(transformer)
    parameters = list(adapter.parameters())
    wanted = torch.autograd.grad(run(transformer, latents()).square().mean(), parameters)
    transformer.train().enable_gradient_checkpointing()
    loss = run(transformer, latents()).square().mean()
    with adapter.disabled():
        found = torch.autograd.grad(loss, parameters)
        assert not any(layer.enabled for layer in adapter.layers.values())
    assert all(map(torch.equal, found, wanted))


def test_a_gradient_through_compiled_blocks_and_through_waiting_ones() -> None:
    copied = based("fp32")
    copied.transformer_blocks = torch.nn.ModuleList()  # half the time to compile
    wanted = gradient(copied, None)
    for kind in ("compiled", "waiting"):
        transformer = copy.deepcopy(copied)
        adapter = adapted(transformer, "**.attn.to_q")
        on = run(transformer, latents()).detach()
        numerics.enable_checkpointing(transformer)
        if kind == "compiled":
            CompiledBlocks(transformer, backend="aot_eager")
        else:
            BlockOffload(transformer, 2, "cpu")
        student = run(transformer, latents())
        torch.testing.assert_close(student.detach(), on, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient(transformer, adapter), wanted, atol=1e-7, rtol=1e-4)
        student.square().mean().backward()  # last, though it was computed first
        assert all(parameter.grad is not None for parameter in adapter.parameters())

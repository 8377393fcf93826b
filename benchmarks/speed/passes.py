"""Training steps: ours, and what others would run for the same; one contender a row of `contenders`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.speed.sizes import Size, network, prompt, weight_bytes
from benchmarks.speed.theirs import RATE, lokr_step, lora_step
from benchmarks.speed.timing import Contender, Run, clocked
from diffusers import FluxTransformer2DModel
from torch import nn

from libreflux.adapter import plan
from libreflux.adapter.adapter import Adapter
from libreflux.model.compiling import CompiledBlocks
from libreflux.model.fused_attention import fuse_attention
from libreflux.model.int8 import quantise_model
from libreflux.model.numerics import enable_checkpointing, pinned
from libreflux.model.w8a8 import kind_for, quantise_activations
from libreflux.recipe import AdapterSpec, OptimizerSpec
from libreflux.training.gradient import accumulate_gradient, clip_grad_norm
from libreflux.training.objective import NoisedBatch, flow_matching_loss
from libreflux.training.optimizer import make_optimizer

STACK = "the report's stack"
OURS = "ours int8"
OURS_BF16 = "ours bf16"
OURS_W8A8 = "ours w8a8"
BASES = ("int8", "bf16", "w8a8")


def contenders(size: Size, side: int, tokens: int, device: str) -> list[Contender]:
    """Of one training step: forward, backward, clip, optimizer."""
    own = partial(own_step, size, side, tokens, device)
    int8, bf16 = weight_bytes(size, 1), weight_bytes(size, 2)
    extra = 0.9 * weight_bytes(size, 1)  # about: the adapter, its gradient and moments, activations
    return [
        Contender(OURS, partial(own, "int8"), ours=True, bytes=int8 + extra),
        Contender(STACK, partial(lokr_step, size, side, device, "quanto"), bytes=int8 + extra, counted=False),
        Contender(OURS_W8A8, partial(own, "w8a8"), ours=True, bytes=int8 + extra),
        Contender(OURS_BF16, partial(own, "bf16"), ours=True, bytes=bf16 + extra),
        Contender("lycoris, bf16 base", partial(lokr_step, size, side, device, "bf16"), bytes=bf16 + extra),
        Contender(
            "torchao int8, lycoris",
            partial(lokr_step, size, side, device, "torchao"),
            bytes=int8 + extra,
            counted=False,
        ),
        Contender("peft LoRA 16, bf16 base", partial(lora_step, size, side, device), bytes=bf16),
    ]


def compiled_contenders(size: Size, side: int, tokens: int, device: str) -> list[Contender]:
    """The same step with compiled blocks, beside the first of `contenders`."""
    first = contenders(size, side, tokens, device)[0]
    own = partial(own_step, size, side, tokens, device, compiled=True)
    return [
        first,
        *(Contender(f"ours {base}, compiled", partial(own, base), **of_compiled(size, base)) for base in BASES),
    ]


def of_compiled(size: Size, base: str) -> dict[str, Any]:
    """What compiled contenders have in common; the operations inside compiled blocks are not to be seen."""
    return {"ours": True, "bytes": weight_bytes(size, 3 if base == "bf16" else 2), "counted": False}


def ours(size: Size, device: str, base: str, *, compiled: bool = False) -> FluxTransformer2DModel:
    """The network as libreflux holds it: base is bf16, int8 or w8a8."""
    made = network(size, device)
    fuse_attention(made)
    if base != "bf16":
        quantise_model(made)
    if base == "w8a8":
        quantise_activations(made, kind_for(device))
    if compiled:
        CompiledBlocks(made)
    return made


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """As diffusers would: each kind of block once, as `torch.compile` finds them alike."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile()


def adapted(size: Size, transformer: nn.Module) -> Adapter:
    """The size's adapter, attached."""
    spec = AdapterSpec.model_validate(size.adapter)
    layers = plan.plan(spec, transformer).layers
    return plan.build(spec, transformer, layers, dtype=torch.bfloat16, seed=0)


def own_step(size: Size, side: int, tokens: int, device: str, base: str, *, compiled: bool = False) -> Run:
    """One training step of ours: forward, backward, clip, optimizer; see `ours` for the base."""
    transformer = ours(size, device, base)
    adapter = adapted(size, transformer)
    enable_checkpointing(transformer)
    transformer.train()
    if compiled:
        CompiledBlocks(transformer)
    optimizer = make_optimizer(OptimizerSpec(kind="adamw_bf16", learning_rate=RATE), adapter.named_parameters(), 0)
    parameters = list(adapter.parameters())
    latents = torch.randn(1, 16, side // 8, side // 8, device=device)
    sigma = torch.tensor([0.5], device=device)
    batch = NoisedBatch(latents, torch.randn_like(latents), sigma, prompt(size, tokens, device))

    gradient = torch.zeros(sum(one.numel() for one in parameters), device=device)

    def step() -> dict[str, float]:
        gradient.zero_()
        with pinned(device):
            flow_matching_loss(transformer, batch).mean().backward()
            accumulate_gradient(gradient, parameters)

            def move() -> None:
                clip_grad_norm(gradient, 1.0)
                optimizer.step(RATE, gradient)

            return {"clip and optimizer": clocked(device, move)}

    return step

"""Training steps: ours, and what others would run for the same; one contender a row of `contenders`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks.speed.sizes import PADDED, Size, network, prompt, weight_bytes
from benchmarks.speed.timing import Contender, Run, clocked
from libreflux.adapter import plan
from libreflux.adapter.adapter import Adapter
from libreflux.model.int8 import quantise_model
from libreflux.model.latents import image_ids
from libreflux.model.numerics import enable_checkpointing, pinned
from libreflux.recipe import AdapterSpec, OptimizerSpec
from libreflux.training.objective import NoisedBatch, flow_matching_loss
from libreflux.training.optimizer import clip_grad_norm, make_optimizer
from libreflux.training.step import accumulate_gradient

STACK = "the report's stack"
OURS = "ours int8"
OURS_BF16 = "ours bf16"
OURS_W8A8 = "ours w8a8"
QUANTO_LEAVES = "*.norm *.norm1 *.norm2 *.norm2_context proj_out x_embedder norm_out context_embedder".split()
RATE = 1e-5


def contenders(size: Size, side: int, tokens: int, device: str) -> list[Contender]:
    """Of one training step: forward, backward, clip, optimizer."""
    own = partial(_ours, size, side, tokens, device)
    int8, bf16 = weight_bytes(size, 1), weight_bytes(size, 2)
    extra = 0.9 * weight_bytes(size, 1)  # adapter, its gradient, moments, activations: measured on the slice
    found = [
        Contender(OURS, partial(own, "int8"), ours=True, bytes=int8 + extra),
        Contender(STACK, partial(_theirs, size, side, device, "quanto"), bytes=int8 + extra, counted=False),
        Contender(OURS_W8A8, partial(own, "w8a8"), ours=True, bytes=int8 + extra),
        Contender(OURS_BF16, partial(own, "bf16"), ours=True, bytes=bf16 + extra),
        Contender("lycoris, bf16 base", partial(_theirs, size, side, device, "bf16"), bytes=bf16 + extra),
        Contender("torchao int8, lycoris", partial(_theirs, size, side, device, "torchao"), bytes=int8 + extra),
        Contender("peft LoRA 16, bf16 base", partial(_peft, size, side, device), bytes=bf16),
    ]
    if device == "cuda":
        for base in ("int8", "bf16", "w8a8"):
            made = partial(own, base, compiled=True)
            held = bf16 if base == "bf16" else int8
            found.append(Contender(f"ours {base}, compiled", made, ours=True, bytes=held + extra, counted=False))
    return found


def ours(size: Size, device: str, base: str, *, compiled: bool = False) -> FluxTransformer2DModel:
    """The network as libreflux holds it: base is bf16, int8 or w8a8.

    Raises:
        ImportError: w8a8 is not there.
    """
    if base == "w8a8" and importlib.util.find_spec("libreflux.model.w8a8") is None:
        raise ImportError("libreflux.model.w8a8 is missing")
    made = network(size, device)
    if base != "bf16":
        quantise_model(made)
    if base == "w8a8":
        importlib.import_module("libreflux.model.w8a8").quantise_activations(made)
    if compiled:
        compile_blocks(made)
    return made


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Each kind of block once, as `torch.compile` finds them alike."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile()


def adapted(size: Size, transformer: nn.Module) -> Adapter:
    """The size's adapter, attached."""
    spec = AdapterSpec.model_validate(size.adapter)
    layers = plan.plan(spec, transformer).layers
    return plan.build(spec, transformer, layers, dtype=torch.bfloat16, seed=0)


def _ours(size: Size, side: int, tokens: int, device: str, base: str, *, compiled: bool = False) -> Run:
    transformer = ours(size, device, base)
    adapter = adapted(size, transformer)
    enable_checkpointing(transformer)
    transformer.train()
    if compiled:
        compile_blocks(transformer)
    optimizer = make_optimizer(OptimizerSpec(kind="adamw_bf16", learning_rate=RATE), adapter.named_parameters(), 0)
    parameters = list(adapter.parameters())
    latents = torch.randn(1, 16, side // 8, side // 8, device=device)
    sigma = torch.tensor([0.5], device=device)
    batch = NoisedBatch(latents, torch.randn_like(latents), sigma, prompt(size, tokens, device))

    def step() -> dict[str, float]:
        gradient = torch.zeros(sum(one.numel() for one in parameters), device=device)
        with pinned(device):
            flow_matching_loss(transformer, batch).mean().backward()
            accumulate_gradient(gradient, parameters)

            def move() -> None:
                clip_grad_norm(gradient, 1.0)
                optimizer.step(RATE, gradient)

            return {"clip and optimizer": clocked(device, move)}

    return step


def others(size: Size, device: str, kind: str) -> FluxTransformer2DModel:
    """The network as others hold it: kind is bf16, quanto or torchao.

    Raises:
        ImportError: the library is not there.
    """
    if kind == "quanto":
        from optimum.quanto import freeze, qint8, quantize

        made = network(size, device)
        quantize(made, weights=qint8, exclude=QUANTO_LEAVES)
        freeze(made)
    elif kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        made = network(size, device)
        quantize_(made, Int8WeightOnlyConfig())
    else:
        made = network(size, device)
    return made.requires_grad_(False)  # quanto's freeze turns gradients of the base on


def diffusers_pass(size: Size, side: int, device: str, transformer: nn.Module, tokens: int = PADDED) -> Callable[[], Tensor]:
    """One pass of diffusers' network with text of so many tokens, as its pipeline calls it."""
    image = (side // 16) ** 2
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    given = {
        "hidden_states": torch.randn(1, image, size.config["in_channels"], **kind),
        "encoder_hidden_states": torch.randn(1, tokens, size.config["joint_attention_dim"], **kind),
        "pooled_projections": torch.randn(1, size.config["pooled_projection_dim"], **kind),
        "timestep": torch.full((1,), 0.5, **kind),
        "img_ids": image_ids(side // 8, side // 8, device=device),
        "txt_ids": torch.zeros(tokens, 3, device=device),
        "return_dict": False,
    }
    return lambda: transformer(**given)[0]


def _theirs(size: Size, side: int, device: str, kind: str) -> Run:
    """LoKr from lycoris-lora, by-passing where the base is quantised, on diffusers' network; torch's AdamW in bf16."""
    transformer = others(size, device, kind)
    from lycoris import LycorisNetwork, create_lycoris

    factor, modules = size.lycoris
    LycorisNetwork.apply_preset(
        {"target_module": list(modules), "module_algo_map": {name: {"factor": factor} for name in modules}}
    )
    options = {"linear_dim": 10000, "linear_alpha": 1, "factor": factor, "full_matrix": True}
    made = create_lycoris(transformer, 1.0, algo="lokr", bypass_mode=kind != "bf16" or None, **options)
    made.apply_to()
    made.to(device, torch.bfloat16)
    made.requires_grad_(True)
    return _their_step(size, side, device, transformer, made.parameters())


def _peft(size: Size, side: int, device: str) -> Run:
    """LoRA of rank 16 on attention and feed-forward, as diffusers' training example puts it on."""
    from peft import LoraConfig

    transformer = others(size, device, "bf16")
    targets = "attn.to_k attn.to_q attn.to_v attn.to_out.0 ff.net.0.proj ff.net.2 proj_mlp proj_out".split()
    # The end of a name is what peft compares: the blocks' proj_out, and not the network's own, has a dot before it.
    named = [name for name, _ in transformer.named_modules() if name.endswith(tuple(f".{one}" for one in targets))]
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=named))
    trained = [one.requires_grad_() for name, one in transformer.named_parameters() if "lora_" in name]
    for one in trained:
        one.data = one.data.to(torch.bfloat16)
    return _their_step(size, side, device, transformer, trained)


def _their_step(
    size: Size, side: int, device: str, transformer: FluxTransformer2DModel, trained: Iterable[nn.Parameter]
) -> Run:
    parameters = [one for one in trained if one.requires_grad]
    transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    run = diffusers_pass(size, side, device, transformer)
    target = torch.randn((side // 16) ** 2, size.config["in_channels"], device=device)

    def move() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> dict[str, float]:
        with pinned(device):  # cuDNN's attention gives wrong gradients on Hopper, whoever calls it
            nn.functional.mse_loss(run()[0].float(), target).backward()
        return {"clip and optimizer": clocked(device, move)}

    return step

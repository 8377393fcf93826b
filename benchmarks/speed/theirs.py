"""What others would run: diffusers' network, quantised by others, with others' adapters and torch's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from benchmarks.speed.sizes import PADDED, Size, network
from benchmarks.speed.timing import Run, clocked
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.model.latents import image_ids
from libreflux.model.numerics import pinned

RATE = 1e-5
NOT_QUANTISED = ("*.norm", "*.norm1", "*.norm2", "*.norm2_context", "proj_out", "x_embedder", "norm_out")
"""By the report, with the context embedder."""
SINGLE = ("proj_mlp", "proj_out")


def others(size: Size, device: str, kind: str) -> FluxTransformer2DModel:
    """The network as others hold it: kind is bf16, quanto or torchao.

    Raises:
        ImportError: the library is not there.
    """
    if kind == "quanto":
        from optimum.quanto import freeze, qint8, quantize

        made = network(size, device)
        quantize(made, weights=qint8, exclude=[*NOT_QUANTISED, "context_embedder"])
        freeze(made)
    elif kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        made = network(size, device)
        quantize_(made, Int8WeightOnlyConfig())
    else:
        made = network(size, device)
    return made.requires_grad_(False)  # quanto's freeze turns gradients of the base on


def diffusers_pass(
    size: Size, side: int, device: str, transformer: nn.Module, tokens: int = PADDED
) -> Callable[[], Tensor]:
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


def lokr_step(size: Size, side: int, device: str, kind: str) -> Run:
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


def lora_step(size: Size, side: int, device: str) -> Run:
    """LoRA of rank 16 on attention and feed-forward, as diffusers' training example puts it on."""
    from peft import LoraConfig

    transformer = others(size, device, "bf16")
    targets = ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", *SINGLE]
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

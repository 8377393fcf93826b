"""The sizes that are measured: a transformer's configuration, its adapter, pictures; and networks of random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.model.text import TextConditioning

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
SMALL: dict[str, Any] = FLUX | {
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "axes_dims_rope": (8, 28, 28),
}
BLOCKS = ("transformer_blocks.**", "single_transformer_blocks.**")
PADDED = 512
"""Text tokens of whoever pads."""


@dataclass(frozen=True)
class Size:
    """What a size means.

    Attributes:
        told: in words, for tables.
        config: of the transformer.
        adapter: a recipe's `adapter` section.
        lycoris: the factor, and the kinds of module that lycoris-lora looks for linears in.
        sides: pixels of the training pictures, smallest first.
        drawn: pixels of drawn pictures.
        rounds: of whole passes, timed.
    """

    told: str
    config: Mapping[str, Any]
    adapter: Mapping[str, Any]
    lycoris: tuple[int, Sequence[str]]
    sides: Sequence[int]
    drawn: int
    rounds: int

    @property
    def width(self) -> int:
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])


def _all_linears(factor: int) -> dict[str, Any]:
    return {"kind": "lokr", "init": "perturbed", "targets": [{"layers": one, "factor": factor} for one in BLOCKS]}


WHOLE_BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
SIZES = {
    "slice": Size(
        "FLUX.1 at full width, 2 double and 4 single blocks; LoKr factor 4 on all linears of the blocks",
        FLUX | {"num_layers": 2, "num_single_layers": 4},
        _all_linears(4),
        (4, WHOLE_BLOCKS),
        (256, 512),
        512,
        3,
    ),
    "full": Size(
        "FLUX.1, 19 double and 38 single blocks; LoKr libreflux-600m",
        FLUX,
        {"kind": "lokr", "init": "perturbed", "preset": "libreflux-600m"},
        (3, ("FluxAttention", "FeedForward")),
        (512, 1024),
        1024,
        3,
    ),
    "emoji": Size(
        "the emoji transformer; LoKr factor 4 on all linears of the blocks",
        SMALL,
        _all_linears(4),
        (4, WHOLE_BLOCKS),
        (64, 128),
        64,
        1,
    ),
}


def empty_network(size: Size) -> FluxTransformer2DModel:
    """On the meta device."""
    with torch.device("meta"):
        return FluxTransformer2DModel(**size.config)


def network(size: Size, device: str) -> FluxTransformer2DModel:
    """In bf16 and frozen, of random weights: matrices that keep the size of what passes through them."""
    made = empty_network(size).to(torch.bfloat16).to_empty(device=device)
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for name, parameter in made.named_parameters():
        _fill(name, parameter, drawn)
    return made.requires_grad_(False)


@torch.no_grad()
def _fill(name: str, parameter: nn.Parameter, drawn: Tensor) -> None:
    """The same numbers again and again, since drawing billions takes longer than what is measured."""
    if parameter.ndim < 2:
        parameter.fill_(float("norm_" in name and name.endswith("weight")))
        return
    flat = parameter.view(-1)
    scaled = drawn * parameter.shape[-1] ** -0.5
    for part in flat.split(len(scaled)):
        part.copy_(scaled[: len(part)])


def prompt(size: Size, tokens: int, device: str) -> TextConditioning:
    """One prompt, as long as asked for."""
    wide, pooled = size.config["joint_attention_dim"], size.config["pooled_projection_dim"]
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return TextConditioning([torch.randn(tokens, wide, **kind)], torch.randn(1, pooled, **kind))


def weight_bytes(size: Size, bytes_each: float) -> float:
    """Of a network whose numbers have so many bytes each."""
    return bytes_each * sum(one.numel() for one in empty_network(size).parameters())

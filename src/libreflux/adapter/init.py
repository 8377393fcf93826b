"""First values of a LoKr (Kaiming, ones, or the perturbed normal of the LibreFLUX recipe) and of a LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from libreflux import seeding
from libreflux.adapter.layers import AdaptedLinear, LoKr, LoRA, delta_norm, dense_weight
from libreflux.errors import AdapterError
from libreflux.model import int8

Kind = Literal["kaiming", "ones", "perturbed"]
CARDS = ("cuda", "mps", "xpu")  # that have generators of their own


def kaiming_w1(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(b), 1/sqrt(b)) of shape [a, b]: torch's Kaiming-uniform with a = sqrt(5), which is LyCORIS' start."""
    bound = 1 / math.sqrt(shape[1])
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def perturbed_w2(weight: Tensor, shape: tuple[int, int], scale: float, generator: torch.Generator) -> Tensor:
    """Normal noise standardised exactly to mean scale * mean(W) and (population) std scale * std(W).

    With w1 = 1, delta = kron(1, w2) repeats w2 in every tile, so ||delta|| / ||W|| = scale without any further step
    (LibreFLUX' perturbed-normal init, whose first rescaling its second one cancels).

    Args:
        weight: W [out, in].
        shape: of w2, [c, d].
        scale: norm of the delta relative to W's.
        generator: the noise is drawn where it lives, on a CPU in fp64, elsewhere in fp32.

    Returns:
        [c, d] fp32 on W's device. A w2 of one entry is scale * mean(W).
    """
    std, mean = torch.std_mean(weight.float(), correction=0)
    wide = torch.float64 if generator.device.type == "cpu" else torch.float32
    noise = torch.randn(shape, generator=generator, dtype=wide, device=generator.device)
    spread, centre = torch.std_mean(noise, correction=0)
    noise = (noise - centre) / spread if noise.numel() > 1 else torch.zeros_like(noise)
    return scale * (mean + std * noise.to(device=weight.device, dtype=torch.float32))


def init_lokr(layer: AdaptedLinear, kind: Kind, seed: int, name: str, scale: float = 1e-3) -> None:
    """Give a layer's LoKr its first values, a function of (seed, name), and of the kind of device under `perturbed`.

    A card makes the noise itself: 3.2 B numbers from a CPU kept eight cards waiting for minutes.

    Args:
        layer: adapted with a LoKr; `perturbed` needs a floating-point or `Int8Linear` base.
        kind: `kaiming`: w1 uniform, w2 = 0. `ones`: w1 = 1, w2 = 0. `perturbed`: w1 = 1, w2 = `perturbed_w2`. The first
            two leave the model's function as it is.
        seed: of the run.
        name: of the layer.
        scale: of `perturbed`, > 0.

    Raises:
        AdapterError: unknown kind, a LoRA, a scale that is not positive, or under `perturbed` a base that is
            adapted or quantised by others.
    """
    delta = layer.delta
    if not isinstance(delta, LoKr):
        raise AdapterError("only LoKr has these initial values", where=name)
    generator = seeding.generator(seed, "adapter-init", name)
    a, b = delta.lokr_w1.shape
    c, d = delta.lokr_w2.shape
    with torch.no_grad():
        if kind == "kaiming":
            delta.lokr_w1.copy_(kaiming_w1((a, b), generator))
            delta.lokr_w2.zero_()
        elif kind == "ones":
            delta.lokr_w1.fill_(1.0)
            delta.lokr_w2.zero_()
        elif kind == "perturbed":
            if not scale > 0:
                raise AdapterError(f"init scale {scale} must be positive", where=name, hint="use init: ones for none")
            delta.lokr_w1.fill_(1.0)
            weight = _base_weight(layer, name).to(delta.lokr_w2.device)  # of a block that waits in RAM it comes over
            if weight.device.type in CARDS:
                generator = seeding.generator(seed, "adapter-init", name, device=weight.device)
            delta.lokr_w2.copy_(perturbed_w2(weight, (c, d), scale, generator))
        else:
            known = ", ".join(get_args(Kind))
            raise AdapterError(f"init {kind!r} is unknown", where=name, hint=f"use one of {known}")


def _base_weight(layer: AdaptedLinear, name: str) -> Tensor:
    """W, of an int8 base too: only its mean and standard deviation are used, nothing is merged into it."""
    if isinstance(layer.base, int8.Int8Linear):
        return int8.dense_weight(layer.base, name)
    return dense_weight(layer.base, name)


def init_lora(lora: LoRA, seed: int, name: str) -> None:
    """down ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming), up = 0: the model's function stays; a function of (seed, name)."""
    generator = seeding.generator(seed, "adapter-init", name)
    rank, width = lora.lora_down.shape
    with torch.no_grad():
        lora.lora_down.copy_(kaiming_w1((rank, width), generator))
        lora.lora_up.zero_()


def relative_norms(layers: Mapping[str, AdaptedLinear]) -> dict[str, tuple[float, float]]:
    """Layer -> (||delta||, ||W||), Frobenius, without building delta."""
    return {
        name: (
            delta_norm(layer.delta),
            float(torch.linalg.vector_norm(_base_weight(layer, name), dtype=torch.float32)),
        )
        for name, layer in layers.items()
    }


def check_start(layers: Mapping[str, AdaptedLinear], kind: Kind | None, scale: float) -> float:
    """||delta|| / ||W|| over all layers of a fresh adapter.

    Args:
        layers: layer name -> adapted linear.
        kind: how it was started; None: not by us.
        scale: of `perturbed`, which must be met within 5 % in every layer whose weight is not zero.

    Raises:
        AdapterError: a perturbed layer misses its scale.
    """
    norms = relative_norms(layers)
    if kind == "perturbed":
        for name, (delta, weight) in norms.items():
            if weight and abs(delta / weight / scale - 1) > 0.05:
                hint = "give this layer a smaller factor, or use init: ones"
                what = f"starts with ||delta|| / ||W|| = {delta / weight:.3g}, not within 5 % of scale {scale:g}"
                raise AdapterError(what, where=name, hint=hint)
    delta, weight = (math.hypot(*(pair[side] for pair in norms.values())) for side in (0, 1))
    return delta / weight if weight else 0.0

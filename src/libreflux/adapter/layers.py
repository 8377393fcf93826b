"""The adapted linear: y = base(x) + weight * delta(x), where delta is a LoKr or a LoRA and base stays frozen.

LoKr (LyCORIS, Yeh et al. 2024, arXiv:2309.14859): W' = W + scale * kron(w1, w2). The Kronecker product is never built
in a forward pass, and W + delta is never formed, so that a small delta is not lost in the rounding of a bf16 W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libreflux.adapter.factors import lokr_shapes
from libreflux.adapter.products import add_lokr, add_lora, lokr_apply
from libreflux.errors import AdapterError
from libreflux.model.device import with_fp64
from libreflux.model.switches import Switched


class LoKr(nn.Module):
    """delta(x) = kron(lokr_w1, lokr_w2) @ x, both factors full matrices (LyCORIS then fixes scale to 1).

    Args:
        in_features: features of x.
        out_features: features of the result.
        factor: wished size of the small parts, see `factors.factorization`.
        dtype: of the parameters, fp32 or bf16; the sum is computed in x's dtype (autocast's under autocast).
        device: of the parameters.

    The parameters start at zero; `init.init_lokr` gives them values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        factor: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        shape1, shape2 = lokr_shapes(in_features, out_features, factor)
        self.lokr_w1 = nn.Parameter(torch.zeros(shape1, dtype=dtype, device=device))
        self.lokr_w2 = nn.Parameter(torch.zeros(shape2, dtype=dtype, device=device))

    def forward(self, x: Tensor, out: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """delta(x); with `out`, which is overwritten, out + strength * delta(x)."""
        if out is not None:
            return add_lokr(out, x, self.lokr_w1, self.lokr_w2, strength)
        return lokr_apply(x, self.lokr_w1.to(x.dtype), self.lokr_w2.to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a LyCORIS file, by suffix; alpha is 1, which full-matrix LoKr ignores."""
        return {"lokr_w1": self.lokr_w1.detach(), "lokr_w2": self.lokr_w2.detach(), "alpha": torch.tensor(1.0)}


class LoRA(nn.Module):
    """delta(x) = (alpha / rank) * up @ down @ x (Hu et al. 2021, arXiv:2106.09685).

    Args:
        in_features: features of x.
        out_features: features of the result.
        rank: rows of down.
        alpha: numerator of the scale; None means rank, a scale of 1.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.rescale(float(rank if alpha is None else alpha))
        self.lora_down = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype, device=device))
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))

    def rescale(self, alpha: float) -> None:
        """Give the scale another numerator."""
        self.alpha, self.scale = alpha, alpha / self.rank

    def forward(self, x: Tensor, out: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """delta(x); with `out`, out + strength * delta(x)."""
        if out is not None:
            return add_lora(out, x, self.lora_down, self.lora_up, strength * self.scale)
        return self.scale * F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a LyCORIS or kohya file, by suffix."""
        return {
            "lora_down.weight": self.lora_down.detach(),
            "lora_up.weight": self.lora_up.detach(),
            "alpha": torch.tensor(self.alpha),
        }


class AdaptedLinear(Switched):
    """y = base(x) + weight * delta(x).

    Args:
        base: a frozen linear: nn.Linear, an int8 linear, or another AdaptedLinear (adapters stack).
        delta: a LoKr or LoRA of the same features.
        weight: strength of the adapter.

    It has no `.weight` matrix on purpose: whoever read one would lose the delta without a word.

    Attributes:
        enabled: False leaves the base alone, see `Adapter.disabled`.
        origin: the file that the delta is of, for errors; "" for none.
    """

    def __init__(self, base: nn.Module, delta: LoKr | LoRA, weight: float = 1.0) -> None:
        super().__init__()
        # base before delta: diffusers takes a model's dtype from its first parameter, which must not be the adapter's.
        self.base = base.requires_grad_(False)
        self.delta = delta
        self.strength, self.enabled, self.origin = float(weight), True, ""
        self.in_features, self.out_features = features(base)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if not self.enabled:
            return out
        added: Tensor = self.delta(x, out, self.strength)  # called, and not a method of it: hooks may bring its weights
        return added

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, strength={self.strength}"


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of anything shaped like a linear."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not (isinstance(sizes[0], int) and isinstance(sizes[1], int)):
        raise AdapterError(f"{type(module).__name__} is not a linear layer", hint="adapt layers that have in_features")
    return sizes[0], sizes[1]


def linears(root: nn.Module) -> dict[str, nn.Module]:
    """Every linear of a model by dotted name, in the model's order; an adapted one counts once, under its own name."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if isinstance(child, AdaptedLinear | nn.Linear) or hasattr(child, "in_features"):
                yield name, child
            else:
                yield from walk(child, f"{name}.")

    return dict(walk(root, ""))


def linear_shapes(root: nn.Module) -> list[tuple[str, int, int]]:
    """(name, in_features, out_features) of every linear: what `targets.resolve` takes."""
    return [(name, *features(module)) for name, module in linears(root).items()]


def dense_weight(linear: nn.Module, name: str) -> Tensor:
    """The weight [out, in] of a plain floating-point linear, the storage itself: what may be merged into.

    Raises:
        AdapterError: the layer is adapted (its weight alone is not what it computes) or quantised.
    """
    if isinstance(linear, AdaptedLinear):
        raise AdapterError("an adapter is attached to this layer", where=name, hint="detach it first")
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Linear) or weight is None or not weight.is_floating_point():
        raise AdapterError(f"{type(linear).__name__} is quantised", where=name, hint="use the model's bf16 weights")
    if type(weight.data) is not Tensor or weight.dtype.itemsize < 2:
        raise AdapterError(f"weight is stored as {weight.dtype}", where=name, hint="open the model in bf16 or fp32")
    return weight.detach()


LOKR_SUFFIXES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LORA_SUFFIXES = ("lora_down.weight", "lora_up.weight")
NOT_SUPPORTED = ("dora_scale", "lokr_t2", "lora_mid.weight", "scalar")


def _scale(tensors: Mapping[str, Tensor], rank: int) -> float:
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return alpha / rank if alpha else 1.0


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _double(tensor: Tensor) -> Tensor:
    return with_fp64(tensor.detach()).double()


def _lokr_factor(tensors: Mapping[str, Tensor], side: str, where: str) -> tuple[Tensor, int | None]:
    """A factor as fp32 full matrix, and its rank when it was stored as a product of two."""
    have = {suffix for suffix in (side, f"{side}_a", f"{side}_b") if suffix in tensors}
    if have == {side}:
        return _wide(tensors[side]), None
    if have == {f"{side}_a", f"{side}_b"}:
        left, right = _wide(tensors[f"{side}_a"]), _wide(tensors[f"{side}_b"])
        if left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]:
            return left @ right, left.shape[1]
        raise AdapterError(
            f"{side}_a {tuple(left.shape)} and {side}_b {tuple(right.shape)} do not multiply", where=where
        )
    raise AdapterError(f"needs {side}, or {side}_a and {side}_b; has {sorted(tensors)}", where=where)


def delta_from_tensors(
    tensors: Mapping[str, Tensor], in_features: int, out_features: int, where: str, *, dtype: torch.dtype | None = None
) -> LoKr | LoRA:
    """The delta that an adapter file describes for one layer.

    Args:
        tensors: by suffix: `lokr_w1`, `lokr_w2`, their low-rank halves `_a`, `_b`, or `lora_down.weight`,
            `lora_up.weight`; `alpha` optional (0 or absent: scale 1; full-matrix LoKr ignores it, as LyCORIS does).
        in_features: of the layer.
        out_features: of the layer.
        where: the layer's name, for errors.
        dtype: of the new parameters; None keeps the file's, except where low-rank LoKr halves are multiplied: fp32.

    Low-rank LoKr factors become full matrices, multiplied in fp32 with the scale taken into w2.

    Raises:
        AdapterError: leftover or missing tensors, or sizes that do not fit the layer.
    """
    refused = [suffix for suffix in NOT_SUPPORTED if suffix in tensors]
    if refused:
        raise AdapterError(f"{', '.join(refused)} not supported yet", where=where, hint="use plain LoKr or LoRA files")
    leftover = sorted(set(tensors) - {*LOKR_SUFFIXES, *LORA_SUFFIXES, "alpha"})
    if leftover:
        raise AdapterError(f"unknown tensors {', '.join(leftover)}", where=where, hint="use plain LoKr or LoRA files")
    is_lora = any(suffix in tensors for suffix in LORA_SUFFIXES)
    if is_lora and any(suffix in tensors for suffix in LOKR_SUFFIXES):
        raise AdapterError("LoKr and LoRA tensors for the same layer", where=where)
    delta: LoKr | LoRA
    if is_lora:
        delta = _lora_from_tensors(tensors, in_features, out_features, where)
    else:
        delta = _lokr_from_tensors(tensors, in_features, out_features, where)
    exact = set(tensors) <= {"lokr_w1", "lokr_w2", *LORA_SUFFIXES, "alpha"}
    dtypes = {tensor.dtype for suffix, tensor in tensors.items() if suffix != "alpha"}
    stored = functools.reduce(torch.promote_types, dtypes) if exact else torch.float32
    return delta.to(dtype=dtype or stored)


def _lora_from_tensors(tensors: Mapping[str, Tensor], in_features: int, out_features: int, where: str) -> LoRA:
    missing = [suffix for suffix in LORA_SUFFIXES if suffix not in tensors]
    if missing:
        raise AdapterError(f"{', '.join(missing)} missing", where=where)
    down, up = (tensors[suffix] for suffix in LORA_SUFFIXES)
    if down.ndim != 2 or tuple(down.shape[1:]) != (in_features,) or tuple(up.shape) != (out_features, down.shape[0]):
        raise _misfit(where, f"LoRA {tuple(up.shape)} x {tuple(down.shape)}", in_features, out_features)
    rank = down.shape[0]
    lora = LoRA(in_features, out_features, rank, alpha=_scale(tensors, rank) * rank, dtype=down.dtype)
    lora.lora_down, lora.lora_up = nn.Parameter(down.detach().clone()), nn.Parameter(up.detach().clone())
    return lora


def _lokr_from_tensors(tensors: Mapping[str, Tensor], in_features: int, out_features: int, where: str) -> LoKr:
    w1, rank1 = _lokr_factor(tensors, "lokr_w1", where)
    w2, rank2 = _lokr_factor(tensors, "lokr_w2", where)
    sizes = (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]) if w1.ndim == w2.ndim == 2 else None
    if sizes != (out_features, in_features):
        raise _misfit(where, f"LoKr {tuple(w1.shape)} x {tuple(w2.shape)}", in_features, out_features)
    rank = rank2 or rank1
    lokr = LoKr(1, 1, 1)
    lokr.lokr_w1, lokr.lokr_w2 = (
        nn.Parameter(w1.clone()),
        nn.Parameter(w2 * _scale(tensors, rank) if rank else w2.clone()),
    )
    return lokr


def _misfit(where: str, found: str, in_features: int, out_features: int) -> AdapterError:
    return AdapterError(
        f"{found} does not fit a linear of {out_features} x {in_features}",
        where=where,
        hint="attach the adapter to the kind of model it was trained on",
    )


def delta_weight(delta: LoKr | LoRA) -> Tensor:
    """The dense delta [out, in] in fp32 (fp64 for fp64 parameters): for merging and tests only."""
    if isinstance(delta, LoKr):
        return torch.kron(_wide(delta.lokr_w1), _wide(delta.lokr_w2))
    return delta.scale * (_wide(delta.lora_up) @ _wide(delta.lora_down))


def delta_norm(delta: LoKr | LoRA) -> float:
    """||delta|| (Frobenius) without building it: ||w1|| ||w2||, or scale * sqrt(tr(up^T up down down^T))."""
    if isinstance(delta, LoKr):
        return float(_double(delta.lokr_w1).norm() * _double(delta.lokr_w2).norm())
    up, down = _double(delta.lora_up), _double(delta.lora_down)
    return delta.scale * math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))

"""The int8 linear: one byte per weight, one scale per output channel, for a base that is frozen.

W is held as scale * q with q in [-127, 127]: weight only, symmetric, per output channel (Jacob et al. 2018,
arXiv:1712.05877, section 2.1 with zero point 0). The dense matrix is made anew for every product, in the forward and in
the backward pass, in the dtype of the computation, and is never kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from libreflux.errors import ModelError

# Linears that keep their dtype, by the first part of their name: all that the model reads and writes passes through
# them, and they are 54 of FLUX.1's 11,888 million weights, so int8 would save 0.5 %. The AdaLN linears inside the
# blocks (`norm*.linear`) are 27 % of the model and are quantised, as they were in the original LibreFLUX runs.
KEPT = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")

_LARGEST = 127
_AT_ONCE = 2**18  # weights widened to fp32 together, 1 MB: larger temporaries leave holes in the heap that add up
_AT_ONCE_ON_A_CARD = 2**25  # 128 MB: a part is a few launches, and FLUX.1 has 45,000 parts of the other size
# Rows of x up to which a CPU multiplies by int8 weights as they are stored. The AdaLN layers' x has one row for each
# picture: 2.6 ms instead of 13 for 3072 x 18432. torch's kernel needs sizes that are multiples of its blocks.
_FEW = 8


def quantise_weight(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """W to (q, scale) with |W - scale * q| <= scale / 2 (to fp32 rounding), on W's device.

    The scale is max |W| / 127 of its row, rounded up to the next bf16 number: scale * q is then rounded once in bf16,
    and its step is at most 0.8 % wider.

    Args:
        weight: [out, in], floating point; on the meta device shapes alone are made.
        name: for errors.

    Returns:
        q int8 [out, in] and scale fp32 [out], > 0 also for a row of zeros.

    Raises:
        ModelError: not a matrix of finite floating-point numbers.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(f"is {weight.dtype} {tuple(weight.shape)}, not a floating-point matrix", where=name)
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    if weight.is_meta:
        return q, scale
    rows = max(1, (_AT_ONCE if weight.device.type == "cpu" else _AT_ONCE_ON_A_CARD) // weight.shape[1])
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for part, of_q, of_scale in zip(weight.detach().split(rows), q.split(rows), scale.split(rows), strict=True):
        wide = part.float()
        low, high = wide.aminmax(dim=1)
        largest = torch.maximum(high, -low)
        finite &= largest.isfinite().all()  # before their bits are rounded: some of NaN's would become 0
        of_scale.copy_(up_to_bf16(largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny))
        of_q.copy_((wide / of_scale[:, None]).round_())
    if not finite & scale.isfinite().all():  # asked once: a card is waited for each time
        raise ModelError("has weights that are not finite", where=name, hint="the file is damaged: download it again")
    return q, scale


def up_to_bf16(positive: Tensor) -> Tensor:
    """The smallest bf16 number that is not below each fp32 number, as fp32."""
    return ((positive.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def on_cpu(tensor: Tensor) -> bool:
    """Whether a product takes a CPU's path: compiled, and elsewhere, it takes the plain one."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * q [out, in] in `dtype`: one new matrix and no other temporary of its size; bf16 holds every q exactly."""
    if on_cpu(weight) or torch.compiler.is_compiling():
        return weight.to(dtype).mul_(scale.to(dtype)[:, None])
    return torch.mul(weight, scale[:, None], out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (scale * q)^T + bias [..., out] in x's dtype."""
    if not on_cpu(x):
        return F.linear(x, dequantise(weight, scale, x.dtype), bias)
    if x.dtype == torch.bfloat16 and x.numel() <= _FEW * weight.shape[1] and _taken_as_stored(x, weight):
        rows = x.reshape(-1, weight.shape[1])
        out: Tensor = torch.ops.aten._weight_int8pack_mm(rows, weight, scale.to(x.dtype))
        out = out if bias is None else out.add_(bias)
        return out if x.ndim == 2 else torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))
    return F.linear(x, _dense_for_now(weight, scale, x.dtype), bias)


def _taken_as_stored(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's kernel can read both: it ends the process at sizes and addresses that it does not expect."""
    aligned = not (x.data_ptr() % 64 or weight.data_ptr() % 64 or any(n % 64 for n in weight.shape))
    return aligned and x.is_contiguous() and weight.is_contiguous()


class _Reused(threading.local):
    """A thread's memory for one dense weight: new pages for every product cost as much as making the weight."""

    memory: Tensor | None = None


_reused = _Reused()


def _dense_for_now(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantise` on a CPU into memory that the thread's next call overwrites."""
    size = weight.numel() * dtype.itemsize
    if _reused.memory is None or _reused.memory.numel() < size:
        _reused.memory = None
        _reused.memory = torch.empty(size, dtype=torch.uint8)
    dense = _reused.memory[:size].view(dtype).view(weight.shape)
    return dense.copy_(weight).mul_(scale.to(dtype)[:, None])


class _Int8Product(torch.autograd.Function):
    """x W^T + bias. Backward makes W again: autograd keeps the quantised tensors only, none of which has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return product(x, weight, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        make = _dense_for_now if on_cpu(grad) else dequantise
        return grad @ make(weight, scale, grad.dtype), None, None, None


class Int8Linear(nn.Module):
    """A frozen linear with an int8 weight, computed in x's dtype (autocast's under autocast).

    Args:
        in_features: features of x.
        out_features: features of the result.
        bias: whether it has one.
        dtype: of the bias.
        device: of the buffers.

    Attributes:
        weight: q, int8 [out, in].
        scale: fp32 [out]; stays fp32 when the module is cast.
        bias: [out] or None.
        multiply: another product of (x, weight, scale, bias), see `w8a8.quantise_activations`; None: x stays as it is.

    The first three are buffers, zero at first (scale one): nothing here can require a gradient.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.multiply is not None:
            return self.multiply(x, self.weight, self.scale, bias)
        product: Tensor = _Int8Product.apply(x, self.weight, self.scale, bias)
        return product

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # module.to(torch.float16) would lose the small scales
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantise(linear: nn.Linear, name: str = "linear") -> Int8Linear:
    """The int8 linear of a floating-point one, on its device; the bias is shared.

    Raises:
        ModelError: its weights are not finite.
    """
    made = Int8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight, made.scale = quantise_weight(linear.weight, name)
    made.bias = None if linear.bias is None else linear.bias.detach()
    return made


def dense_weight(linear: nn.Module, name: str = "linear") -> Tensor:
    """W [out, in] of a plain or an int8 linear, for whoever needs its numbers: an int8 one's is a new fp32 matrix.

    Raises:
        ModelError: any other module.
    """
    if isinstance(linear, Int8Linear):
        return dequantise(linear.weight, linear.scale, torch.float32)
    if isinstance(linear, nn.Linear) and linear.weight.is_floating_point():
        return linear.weight.detach()
    raise ModelError(f"{type(linear).__name__} has no dense weight", where=name)


def becomes_int8(name: str) -> bool:
    """Whether a linear of this name is int8 in an int8 transformer."""
    return name.split(".")[0] not in KEPT


def quantise_model(transformer: nn.Module) -> list[str]:
    """Put int8 linears in the place of a transformer's linears, one by one, except those under `KEPT`.

    Args:
        transformer: FLUX's; on the meta device it becomes one to be filled.

    Returns:
        Names of the int8 linears of the transformer, in its order, those that were int8 before included.
    """
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and becomes_int8(name):
            path, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(path), child, quantise(module, name))
    return int8_layers(transformer)


def dequantise_model(transformer: nn.Module, dtype: torch.dtype) -> list[str]:
    """Put plain linears, frozen, in the place of a transformer's int8 ones, one by one.

    Args:
        transformer: FLUX's; its config no longer says that it is int8.
        dtype: of the new weights and biases.

    Returns:
        Names of the layers that were int8.
    """
    names = int8_layers(transformer)
    for name in names:
        path, _, child = name.rpartition(".")
        old = transformer.get_submodule(name)
        assert isinstance(old, Int8Linear)
        made = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        made.weight = nn.Parameter(dequantise(old.weight, old.scale, torch.float32).to(dtype), requires_grad=False)
        if old.bias is not None:
            made.bias = nn.Parameter(old.bias.to(dtype), requires_grad=False)
        setattr(transformer.get_submodule(path), child, made)
    return names


def int8_layers(transformer: nn.Module) -> list[str]:
    """Names of the int8 linears of a transformer, in its order; none for a plain one."""
    return [name for name, module in transformer.named_modules() if isinstance(module, Int8Linear)]

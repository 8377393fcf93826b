"""Products of 8-bit weights with 8-bit activations, W8A8: int8 linears whose x is quantised too, per token, as it comes

    forward   y = (q(x) W^T) s_x s_w + b            per token s_x = max |x| / 127, per output channel s_w
    backward  dx = (q(dy s_w) W) s,  s of dy s_w    s_w lies along the sum, so it goes into dy before that is quantised

(forward: Dettmers et al. 2022, arXiv:2208.07339, section 2, "vector-wise"). Products are summed in int32, so they are
the same on every device that does it right. On Hopper and later, where int8 is no faster than bf16, they are of e4m3
numbers by rows (Micikevicius et al. 2022, arXiv:2209.05433), summed in fp32, from the same int8 weights.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from libreflux.errors import RunError
from libreflux.model import int8
from libreflux.model.int8 import Int8Linear

Kind = Literal["int8", "fp8"]
"""What activations are rounded to."""

E4M3 = torch.float8_e4m3fn
_LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
_SMALLEST = 1e-30  # scale: that of a row of zeros
_AT_ONCE = 2**20  # numbers that a CPU quantises or scales together: they stay in its caches
_FEWEST = 17  # rows that `torch._int_mm` takes on CUDA


def kind_for(device: torch.device | str) -> Kind:
    """`fp8` from Hopper on (measured there: int8 0.93 times bf16, e4m3 by rows 1.44 times), `int8` elsewhere.

    Raises:
        RunError: a CPU whose int8 products are wrong: without VNNI, oneDNN sums pairs of them in 16 bits.
    """
    device = torch.device(device)
    if device.type == "cpu" and not exact_on_this_cpu():
        told = "this CPU multiplies int8 by int8 wrongly, as CPUs without VNNI do"
        raise RunError(told, where="w8a8", hint="use int8, which multiplies in the model's own dtype")
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0):
        return "fp8"
    return "int8"


@functools.cache
def exact_on_this_cpu() -> bool:
    """Whether `torch._int_mm` gives the sums that it must, at their largest and at random."""
    rows = torch.randint(-127, 128, (32, 192), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    rows[0] = 127
    matrix = rows.T.contiguous()
    return torch.equal(torch._int_mm(rows, matrix).long(), rows.long() @ matrix.long())


def quantise_activations(transformer: nn.Module, kind: Kind | None) -> list[str]:
    """Lets the int8 linears of a transformer quantise what comes in, except the AdaLN ones, whose x is a row a picture.

    Args:
        transformer: with int8 linears.
        kind: see `kind_for`; None: weights only again.

    Returns:
        Names of the layers.
    """
    names = []
    for name, module in transformer.named_modules():
        within = name.removesuffix(".base").split(".")[:-1]  # an adapted linear's own is its base
        if isinstance(module, Int8Linear) and not (within and within[-1].startswith("norm")):
            module.multiply = None if kind is None else (w8a8_int8 if kind == "int8" else w8a8_fp8)
            names.append(name)
    return names


def w8a8_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias [..., out] in x's dtype, in int8; see `quantise_activations`.

    Args:
        x: [..., in].
        weight: int8 [out, in].
        scale: fp32 [out].
        bias: [out] or None.
    """
    made: Tensor = _Product.apply(x, weight, scale, bias, "int8")
    return made


def w8a8_fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same in e4m3."""
    made: Tensor = _Product.apply(x, weight, scale, bias, "fp8")
    return made


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kind: Kind) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.kind = kind
        return scaled_product(x, weight.T, scale, bias, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        return scaled_product(grad, weight, None, None, ctx.kind, before=scale), None, None, None, None


def scaled_product(
    x: Tensor, matrix: Tensor, after: Tensor | None, bias: Tensor | None, kind: Kind, *, before: Tensor | None = None
) -> Tensor:
    """((x before) matrix) after + bias, where x before is quantised per row, and all sums are exact or fp32.

    Args:
        x: [..., k] floating point.
        matrix: int8 [k, n].
        after: fp32 [n], or None for ones.
        bias: [n] or None.
        kind: what x is rounded to.
        before: fp32 [k], or None for ones.

    Returns:
        [..., n] in x's dtype. In weight-only arithmetic on CUDA where there are fewer rows than its kernels take.
    """
    k, n = matrix.shape
    rows = x.reshape(-1, k)
    if kind == "int8" and int8.on_cpu(rows):
        made = _on_a_cpu(rows, matrix, after, bias, before)
    elif rows.device.type == "cuda" and kind == "int8" and len(rows) < _FEWEST:
        made = rows.new_zeros(_FEWEST, k)
        made[: len(rows)] = rows
        made = _at_once(made, matrix, after, bias, kind, before)[: len(rows)]
    else:
        made = _at_once(rows, matrix, after, bias, kind, before)
    return made if x.ndim == 2 else torch.ops.aten._unsafe_view(made, (*x.shape[:-1], n))  # as `linear`: no view


def quantise_rows(x: Tensor, kind: Kind, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x before, in 8 bits, symmetric by rows.

    Args:
        x: [t, k] floating point.
        kind: of the result.
        before: fp32 [k], or None for ones.

    Returns:
        q [t, k] and fp32 scale [t, 1], with |x before - scale q| <= scale / 2 for int8; scale is at least 1e-30.
    """
    scaled = x if before is None else x * before
    largest = torch.linalg.vector_norm(scaled, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    scale = largest.div_(_LARGEST[kind]).clamp_(min=_SMALLEST)
    scaled = scaled / scale
    return (scaled.round_().to(torch.int8) if kind == "int8" else scaled.to(E4M3)), scale


def _at_once(
    x: Tensor, matrix: Tensor, after: Tensor | None, bias: Tensor | None, kind: Kind, before: Tensor | None
) -> Tensor:
    q, scale = quantise_rows(x, kind, before)
    right = _by_columns(matrix)
    if kind == "int8":
        made = torch._int_mm(q, right).float().mul_(scale)
    else:
        right = right.to(E4M3)
        if x.device.type == "cuda" and x.dtype == torch.bfloat16:
            columns = scale.new_ones(1, matrix.shape[1]) if after is None else after[None]
            scaled = torch._scaled_mm(q, right, scale_a=scale, scale_b=columns, out_dtype=x.dtype)
            return scaled if bias is None else scaled.add_(bias)
        made = (q.float() @ right.float()).mul_(scale)
    made = made if after is None else made.mul_(after)
    return (made if bias is None else made.add_(bias)).to(x.dtype)


def _by_columns(matrix: Tensor) -> Tensor:
    """The right operand as cuBLAS wants it, with each column in one piece; a CPU takes either."""
    if matrix.device.type != "cuda" or matrix.stride(0) == 1:
        return matrix
    return matrix.t().contiguous().t()


class _Scratch:
    """Memory for one call's pieces."""

    def __init__(self, rows: int, k: int, n: int) -> None:
        self.wide = torch.empty(rows * max(k, n), dtype=torch.float32)
        self.bits = torch.empty(rows, k, dtype=torch.int16)


def _on_a_cpu(x: Tensor, matrix: Tensor, after: Tensor | None, bias: Tensor | None, before: Tensor | None) -> Tensor:
    """`_at_once` in int8 with all but the product done by some rows at a time, which takes a tenth of the time."""
    (rows, k), n = x.shape, matrix.shape[1]
    q, scale = torch.empty(rows, k, dtype=torch.int8), torch.empty(rows, 1, dtype=torch.float32)
    at_once = max(1, min(rows, _AT_ONCE // max(k, n)))
    scratch = _Scratch(at_once, k, n)
    for part, into, of_scale in zip(x.split(at_once), q.split(at_once), scale.split(at_once), strict=True):
        _quantise_part(part, into, of_scale, before, scratch)
    sums = torch._int_mm(q, matrix)
    made = x.new_empty(rows, n)
    for part, into, of_scale in zip(sums.split(at_once), made.split(at_once), scale.split(at_once), strict=True):
        wide = scratch.wide[: part.numel()].view(part.shape)
        wide.copy_(part).mul_(of_scale)
        if after is not None:
            wide.mul_(after)
        into.copy_(wide if bias is None else wide.add_(bias))
    return made


def _quantise_part(x: Tensor, q: Tensor, scale: Tensor, before: Tensor | None, scratch: _Scratch) -> None:
    wide = scratch.wide[: x.numel()].view(x.shape)
    wide.copy_(x)
    if before is None and x.dtype == torch.bfloat16:  # the bits of |x| in order: twice as fast as `abs` and `amax`
        bits = torch.bitwise_and(x.view(torch.int16), 0x7FFF, out=scratch.bits[: len(x)])
        scale.copy_(bits.amax(dim=1, keepdim=True).view(torch.bfloat16))
    else:
        if before is not None:
            wide.mul_(before)
        low, high = wide.aminmax(dim=1, keepdim=True)
        torch.maximum(high, -low, out=scale)
    scale.div_(_LARGEST["int8"]).clamp_(min=_SMALLEST)
    q.copy_(wide.div_(scale).round_())


def plain_product(
    x: Tensor, matrix: Tensor, after: Tensor | None, bias: Tensor | None, kind: Kind, *, before: Tensor | None = None
) -> Tensor:
    """The twin of `scaled_product`: the same numbers, multiplied in fp64."""
    q, scale = quantise_rows(x.reshape(-1, len(matrix)), kind, before)
    right = matrix.double() if kind == "int8" else matrix.to(E4M3).double()
    made = q.double() @ right * scale
    made = made if after is None else made * after
    made = made if bias is None else made + bias
    return made.to(x.dtype).view(*x.shape[:-1], matrix.shape[1])

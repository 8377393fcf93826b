"""`bf16_update.update` for all parameters of a bucket at once, as a Triton kernel, for CUDA. Not verified on a card.

Two dozen operations of a step would each pass whole vectors through the card's memory; the kernel reads and writes
every number once. `bf16_update.plain_update` is its plain twin. The card must show that it agrees before it is used.

Triton comes with PyTorch for CUDA, and needs a C compiler where it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from libreflux.printing import get_logger
from libreflux.training.bf16_update import Factors, places_apart, plain_update
from libreflux.training.rounding import FIRST, LOW, SECOND, Noise

log = get_logger(__name__)

BLOCK = 1024  # numbers that a program moves
_COLUMNS = tl.constexpr(4)  # of the table: address of the parameter's numbers, place in the bucket, in it, its row
_TRIED = 2**15  # numbers of the trial
_FIRST, _SECOND, _LOW = tl.constexpr(FIRST), tl.constexpr(SECOND), tl.constexpr(LOW)


@triton.jit
def _round(value, noise):  # type: ignore[no-untyped-def]
    bits = (value.to(tl.int32, bitcast=True) + noise) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _kernel(table, sizes, keys, m_all, v_all, grads, rise1, b2, rise2, keep, rate, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    address, offset = tl.load(table + row * _COLUMNS), tl.load(table + row * _COLUMNS + 1)
    start, parameter = tl.load(table + row * _COLUMNS + 2), tl.load(table + row * _COLUMNS + 3)
    lane = tl.arange(0, BLOCK)
    seen = lane < tl.load(sizes + row)
    place = address.to(tl.pointer_type(tl.bfloat16)) + lane
    p = tl.load(place, mask=seen, other=0.0).to(tl.float32)
    m = tl.load(m_all + offset + lane, mask=seen, other=0.0).to(tl.float32)
    v = tl.load(v_all + offset + lane, mask=seen, other=0.0).to(tl.float32)
    g = tl.load(grads + offset + lane, mask=seen, other=0.0)
    m = m + rise1 * (g - m)
    v = v * b2 + rise2 * (g * g)
    p = p * keep - rate * (m / (tl.sqrt_rn(v) + eps))
    z = start.to(tl.int32) + lane + tl.load(keys + 2 * parameter)
    z = z ^ (z >> 16)
    z = z * _FIRST + tl.load(keys + 2 * parameter + 1)
    z = (z ^ (z >> 15)) * _SECOND
    tl.store(place, _round(p, z & _LOW), mask=seen)
    tl.store(v_all + offset + lane, _round(v, z & _LOW), mask=seen)
    tl.store(m_all + offset + lane, _round(m, (z >> 16) & _LOW), mask=seen)


class BucketKernel:
    """The kernel for some parameters and their moments, on one device.

    Args:
        parameters: bf16, contiguous, each of fewer than 2^31 numbers; they may not move in memory afterwards.
        exp_avg: bf16, the first moments of all in their order, flat.
        exp_avg_sq: bf16, the second moments.
    """

    def __init__(self, parameters: Sequence[Tensor], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq
        self.addresses = [parameter.data_ptr() for parameter in parameters]
        rows, sizes, offset = [], [], 0
        for index, parameter in enumerate(parameters):
            for start in range(0, parameter.numel(), BLOCK):
                address = parameter.data_ptr() + start * parameter.element_size()
                rows.append((address, offset + start, start, index))
                sizes.append(min(BLOCK, parameter.numel() - start))
            offset += parameter.numel()
        self.table = torch.tensor(rows, dtype=torch.int64).to(exp_avg.device)
        self.sizes = torch.tensor(sizes, dtype=torch.int32).to(exp_avg.device)

    def __call__(self, grad: Tensor, factors: Factors, noises: Sequence[Noise]) -> None:
        """Moves the parameters and both moments by one step.

        Args:
            grad: fp32, of all parameters, flat.
            factors: of the step.
            noises: of each parameter at this step.
        """
        keys = torch.tensor([(noise.first, noise.second) for noise in noises], dtype=torch.int32)
        _kernel[(len(self.sizes),)](
            self.table,
            self.sizes,
            keys.to(grad.device, non_blocking=True),
            self.exp_avg,
            self.exp_avg_sq,
            grad,
            1 - factors.beta1,
            factors.beta2,
            1 - factors.beta2,
            factors.keep,
            factors.rate,
            factors.eps,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the kernel agrees with its plain twin on this device; a warning says why if it does not."""
    try:
        share = trial(device)
    except Exception as error:  # a missing compiler, a card that Triton does not know: many libraries' errors
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        log.warning("the optimizer's Triton kernel cannot be used (%s): a step takes many short operations", why)
        return False
    if share > 1e-3:
        log.warning("the optimizer's Triton kernel is wrong here (%.1e of the numbers): it is not used", share)
    return share <= 1e-3


def trial(device: torch.device | str) -> float:
    """`places_apart` of kernel and plain twin, of two unequal parameters and their moments."""
    generator = torch.Generator().manual_seed(0)
    sizes = (_TRIED - 77, 77)
    factors, noises = Factors.at(3, 1e-2, (0.9, 0.999), 1e-8, 0.1), [Noise.of(1, 3, name) for name in "ab"]
    p, m, grad = (torch.randn(_TRIED, generator=generator).to(device) for _ in range(3))
    state = [p.bfloat16(), m.bfloat16(), (p * m).square().bfloat16()]
    fast, plain = [one.clone() for one in state], [one.clone() for one in state]
    BucketKernel(fast[0].split(sizes), fast[1], fast[2])(grad, factors, noises)
    parts: Any = zip(*(one.split(sizes) for one in (*plain, grad)), noises, strict=True)
    for a, b, c, g, noise in parts:
        plain_update(a, b, c, g, factors=factors, noise=noise)
    return places_apart(fast, plain)

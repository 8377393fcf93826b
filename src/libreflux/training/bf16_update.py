"""One AdamW step of bf16 numbers in fp32 arithmetic with stochastic rounding, some numbers at a time.

A step is two dozen short operations on each number. Taken over a whole parameter each of them would pass through
memory; over `CHUNK` numbers at a time they stay in a CPU's caches. `plain_update` is the twin, in one piece and formula
by formula, where `update` calls torch's fused AdamW: its order of roundings in fp32 is another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from libreflux.training.rounding import LOW, Noise, stochastic_round_

CHUNK = 2**19
"""Numbers that are moved at a time on a CPU: of 2^17 to 2^21 the quickest (two cores, 32 MB of cache)."""
CHUNK_ON_A_CARD = 2**23
SCRATCH_BYTES = 24  # per number of a chunk: three fp32 and three int32 vectors


@dataclass(frozen=True)
class Factors:
    """What a step multiplies with: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with both bias corrections.

    With c = sqrt(1 - beta2^t): p <- keep p - rate m / (sqrt(v) + eps), where rate and eps have taken c in.

    Attributes:
        step: t, from 1.
        learning_rate, weight_decay, raw_eps: as torch's own AdamW takes them.
    """

    step: int
    learning_rate: float
    weight_decay: float
    raw_eps: float
    beta1: float
    beta2: float
    keep: float
    rate: float
    eps: float

    @staticmethod
    def at(step: int, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Factors:
        """Of one step, from 1."""
        root = math.sqrt(1 - betas[1] ** step)
        return Factors(
            step=step,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            raw_eps=eps,
            beta1=betas[0],
            beta2=betas[1],
            keep=1 - learning_rate * weight_decay,
            rate=learning_rate * root / (1 - betas[0] ** step),
            eps=eps * root,
        )


class Scratch:
    """The temporaries of a chunk, kept between steps."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.size = size
        self.places = torch.arange(size, dtype=torch.int32, device=device)
        self.word, self.half = torch.empty_like(self.places), torch.empty_like(self.places)
        self.p, self.m, self.v = torch.empty(3, size, dtype=torch.float32, device=device)
        self.step = torch.empty((), dtype=torch.float32, device=device)


@torch.no_grad()
def update(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, *, factors: Factors, noise: Noise, scratch: Scratch) -> None:
    """Moves a parameter and its moments by one step.

    Args:
        p: bf16 [n], contiguous; overwritten, as the next two are.
        m: bf16 [n], the first moment.
        v: bf16 [n], the second moment.
        grad: fp32 [n].
        factors: of the step.
        noise: of the parameter at this step.
        scratch: on its device.
    """
    for start in range(0, p.numel(), scratch.size):
        here = slice(start, min(start + scratch.size, p.numel()))
        _move(p[here], m[here], v[here], grad[here], start, factors, noise, scratch)


def _move(
    p: Tensor, m: Tensor, v: Tensor, grad: Tensor, start: int, factors: Factors, noise: Noise, scratch: Scratch
) -> None:
    count = p.numel()
    p32, m32, v32 = (part[:count] for part in (scratch.p, scratch.m, scratch.v))
    word, half = scratch.word[:count], scratch.half[:count]
    for wide, stored in ((p32, p), (m32, m), (v32, v)):
        wide.copy_(stored)
    scratch.step.fill_(factors.step - 1)
    adamw(
        [p32],
        [grad],
        [m32],
        [v32],
        [],
        [scratch.step],
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=factors.learning_rate,
        beta1=factors.beta1,
        beta2=factors.beta2,
        eps=factors.raw_eps,
        weight_decay=factors.weight_decay,
    )
    noise.words_(scratch.places[:count], start, word, half)
    torch.bitwise_and(word, LOW, out=half)
    stochastic_round_(p, p32, half)
    stochastic_round_(v, v32, half)
    stochastic_round_(m, m32, word.bitwise_right_shift_(16).bitwise_and_(LOW))


@torch.no_grad()
def plain_update(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, *, factors: Factors, noise: Noise) -> None:
    """The same as `update`, in one piece; by a place of bf16 other where rounding in fp32 decides it."""
    words = noise.words(p.numel(), p.device)
    first = torch.lerp(m.float(), grad, 1 - factors.beta1)
    second = torch.addcmul(v.float() * factors.beta2, grad, grad, value=1 - factors.beta2)
    moved = torch.addcdiv(p.float() * factors.keep, first, second.sqrt() + factors.eps, value=-factors.rate)
    stochastic_round_(p, moved, words & LOW)
    stochastic_round_(v, second, words & LOW)
    stochastic_round_(m, first, (words >> 16) & LOW)


def places_apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The share of bf16 numbers that are a place apart; 1.0 if any are more than one.

    Two orders of rounding in fp32 lead to other bf16 numbers where the noise lies within 2^-24 of the border.
    """
    places = torch.cat([(_place(a) - _place(b)).abs() for a, b in zip(found, wanted, strict=True)])
    return 1.0 if bool((places > 1).any()) else float((places > 0).double().mean())


def _place(numbers: Tensor) -> Tensor:
    """Where bf16 numbers stand in their order, int32."""
    bits = numbers.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)

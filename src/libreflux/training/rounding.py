"""Stochastic rounding to bf16 (Gupta et al. 2015, arXiv:1502.02551), and the noise that decides it.

The noise of a number is a function of (seed, step, parameter, place in the parameter), so that ranks and resumed runs
agree. `Noise` is a hash of those, equal on every device. `rounding_noise` draws from the device's own generator: runs
that began with it go on with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from libreflux import seeding

HIGH = -(1 << 16)
"""The upper half of an fp32's bits: a bf16."""
LOW = 0xFFFF


def as_int32(number: int) -> int:
    """The int32 with the lowest 32 bits of a number."""
    return ((number + 2**31) & 0xFFFFFFFF) - 2**31


# Multipliers of a 32-bit hash with a low bias (C. Wellons, hash-prospector, 2018: "lowbias32").
FIRST, SECOND = as_int32(0x7FEB352D), as_int32(0x846CA68B)


@dataclass(frozen=True)
class Noise:
    """The noise words of one parameter at one step: two int32 keys, from `of`.

    The word of place i is, in int32 arithmetic that wraps, with shifts that keep the sign:

        y = (z ^ (z >> 16)) FIRST + second,  z = i + first;  word = (y ^ (y >> 15)) SECOND

    Its lower and its upper half are each uniform over 65536 values. The parameter and its second moment are rounded by
    the lower half, the first moment by the upper one. Sharing a half is harmless: a step combines both moments, which
    do not share one, before anything is rounded.
    """

    first: int
    second: int

    @staticmethod
    def of(seed: int, step: int, name: str) -> Noise:
        """Of a parameter's name at one step, from 1."""
        key = seeding.key(seed, "rounding-hash", step, name)
        return Noise(as_int32(key), as_int32(key >> 32))

    def words_(self, places: Tensor, start: int, word: Tensor, spare: Tensor) -> Tensor:
        """Writes the words of places start, start + 1, … into `word`, all int32 of one length; returns it.

        Args:
            places: 0, 1, 2, …
            start: of the first.
            word: overwritten.
            spare: overwritten.
        """
        torch.add(places, as_int32(start + self.first), out=word)
        torch.bitwise_right_shift(word, 16, out=spare)
        word.bitwise_xor_(spare).mul_(FIRST).add_(self.second)
        torch.bitwise_right_shift(word, 15, out=spare)
        return word.bitwise_xor_(spare).mul_(SECOND)

    def words(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """The words of the first `count` places, int32 [count]."""
        places = torch.arange(count, dtype=torch.int32, device=device)
        return self.words_(places, 0, torch.empty_like(places), torch.empty_like(places))


def stochastic_round_(target: Tensor, value: Tensor, noise: Tensor) -> None:
    """Write fp32 numbers into a bf16 tensor so that the expected result is the number itself.

    bf16 is the upper half of an fp32; adding a uniform 16-bit number to the lower half and cutting that off rounds away
    from zero with probability (distance to the lower neighbour) / (distance of the neighbours), for both signs alike.

    Args:
        target: bf16, any shape; overwritten.
        value: fp32 of target's shape, contiguous; used as scratch.
        noise: int16, as many elements, uniform over all 65536 values; or int32, from 0 to 65535.
    """
    bits = value.view(torch.int32)
    bits.add_(noise.view(value.shape))
    if noise.dtype == torch.int16:
        bits.add_(1 << 15)
    bits.bitwise_and_(HIGH)
    target.copy_(value)


def rounding_noise(count: int, rows: int, seed: int, step: int, name: str, device: torch.device) -> Tensor:
    """[rows, count] int16, uniform, a function of (seed, step, name) and the kind of device: equal on all ranks."""
    generator = torch.Generator(device=device).manual_seed(seeding.key(seed, "rounding", step, name) & (2**63 - 1))
    words = torch.randint(-(2**63), 2**63 - 1, ((rows * count + 3) // 4,), generator=generator, device=device)
    return words.view(torch.int16)[: rows * count].view(rows, count)

"""Random numbers as pure functions of (seed, purpose, index…).

Nothing in libreflux draws from a generator that outlives one use: noise, sigma, captions, crops and dropout are each a
function of what they are for, so that resuming, re-sharding or reading with more workers cannot change a number.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Part = int | str


def key(seed: int, purpose: str, *index: Part) -> int:
    """A 64-bit key for (seed, purpose, index…), equal on every machine and in every process.

    Parts are length-prefixed before hashing (BLAKE2b), so ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, purpose, *index):
        raw = f"{type(part).__name__}:{part}".encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return int.from_bytes(digest.digest(), "little")


def rng(seed: int, purpose: str, *index: Part) -> np.random.Generator:
    """A numpy generator (Philox) for this key."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *index)))


def uniforms(seed: int, purpose: str, index: np.ndarray, nth: np.ndarray, count: int) -> np.ndarray:
    """[n, count] fp64 in [0, 1): for each of n (index, nth) what one generator each would draw, a million a second.

    SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195), its finaliser as a hash of the two numbers.

    Args:
        index: [n] 64-bit integers that are spread already, such as digits of a content hash.
        nth: [n] whole numbers, e.g. the visit.
        count: numbers drawn for each.
    """
    state = splitmix64(index.astype(np.uint64) ^ np.uint64(key(seed, purpose)))
    state = splitmix64(state + nth.astype(np.uint64) * _GOLDEN)
    draws = splitmix64(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (draws >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014; constants as Vigna's splitmix64.c), on uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def generator(seed: int, purpose: str, *index: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for this key.

    Draw on the CPU and move, so that every device sees the same numbers; on another device only where there are so
    many of them that the CPU would be waited for. A device's generator gives numbers of its own for a key.
    """
    import torch

    # Mersenne Twister seeds are 64-bit, but torch refuses those that overflow int64 on some paths.
    return torch.Generator(device).manual_seed(key(seed, purpose, *index) & (2**63 - 1))

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


def generator(seed: int, purpose: str, *index: Part) -> torch.Generator:
    """A torch CPU generator for this key; draw on the CPU and move, so that every device sees the same numbers."""
    import torch

    # Mersenne Twister seeds are 64-bit, but torch refuses those that overflow int64 on some paths.
    return torch.Generator().manual_seed(key(seed, purpose, *index) & (2**63 - 1))

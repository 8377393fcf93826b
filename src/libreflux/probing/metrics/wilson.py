"""How far a share of yes and no can be trusted."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson(yes: float, asked: float) -> tuple[float, float]:
    """The score interval of a share, at 95 % (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209).

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n): 24 of 24 is [0.86, 1], where a bootstrap says [1, 1].

    Args:
        yes: how many, 0 to `asked`.
        asked: n, above 0.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    p, more = yes / asked, z * z / asked
    middle, reach = p + more / 2, z * math.sqrt(p * (1 - p) / asked + more / (4 * asked))
    return max(0.0, (middle - reach) / (1 + more)), min(1.0, (middle + reach) / (1 + more))

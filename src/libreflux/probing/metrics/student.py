"""Student's t, for intervals of few numbers. Knows no model, no file."""

from __future__ import annotations

import math


def beyond(t: float, freedom: int) -> float:
    """The probability that |T| is above t ≥ 0, T of Student's t (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).

    Args:
        t: finite.
        freedom: degrees of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(odd, freedom - 1, 2):  # of the cosine
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1.0 - within)


def quantile(probability: float, freedom: int) -> float:
    """The t that |T| is above with this probability, by bisection.

    Args:
        probability: in (0, 1).
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        above = beyond(math.tan(middle) * math.sqrt(freedom), freedom) > probability
        low, high = (middle, high) if above else (low, middle)
    return math.tan(low) * math.sqrt(freedom)

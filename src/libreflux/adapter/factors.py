"""How a LoKr's sides are split into factors, as LyCORIS splits them: shapes alone."""

from __future__ import annotations

from libreflux.errors import AdapterError


def factorization(dim: int, factor: int) -> tuple[int, int]:
    """Split dim = m * n with m <= n, as LyCORIS does, so that shapes agree with its files.

    Args:
        dim: features of one side of a linear, >= 1.
        factor: wished size of the small part. If it divides dim, the pair is (factor, dim / factor), sorted; else the
            largest divisor m <= factor on the way from 1 that keeps m + n shrinking. -1: the most square split.

    Raises:
        AdapterError: factor is 0 or below -1.
    """
    if factor < -1 or factor == 0:
        raise AdapterError(f"factor {factor} is not a size", hint="use a factor >= 1, or -1 for the most square split")
    if factor > 0 and dim % factor == 0:
        m, n = sorted((factor, dim // factor))
        return m, n
    limit = dim if factor == -1 else factor
    m, n = 1, dim
    for candidate in range(2, limit + 1):
        if m >= n:
            break
        if dim % candidate:
            continue
        if candidate + dim // candidate > m + n:
            break
        m, n = candidate, dim // candidate
    return min(m, n), max(m, n)


def lokr_shapes(in_features: int, out_features: int, factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of w1 [a, b] and w2 [c, d], with out_features = a * c and in_features = b * d."""
    b, d = factorization(in_features, factor)
    a, c = factorization(out_features, factor)
    return (a, b), (c, d)

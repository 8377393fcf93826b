"""Distances between two sets of pictures, on features of a judge: Fréchet and kernel; no FID, which is Inception's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), the squared 2-Wasserstein distance of two Gaussians.

    Dowson and Landau 1982; on features as Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    Args:
        a: features [N, D], N ≥ 2.
        b: features [M, D], M ≥ 2.
    """
    a, b = a.double(), b.double()
    return frechet(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Of two normal distributions, by their means [D] and covariances [D, D], see `frechet_distance`."""
    # tr (C_a C_b)^½ = tr (R C_b R)^½ with R = C_a^½: symmetric, so that no complex root can appear.
    root = _root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy under k(x, y) = (x·y / D + 1)³; may be below 0 for equal laws.

    Gretton et al. 2012, eq. 3; the kernel of Bińkowski et al. 2018 (arXiv 1801.01401), eq. 4.

    Args:
        a: features [N, D], N ≥ 2.
        b: features [M, D], M ≥ 2.
    """
    a, b = a.double(), b.double()
    return float(_off_diagonal_mean(_kernel(a, a)) + _off_diagonal_mean(_kernel(b, b)) - 2 * _kernel(a, b).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(square: Tensor) -> Tensor:
    count = len(square)
    return (square.sum() - square.trace()) / (count * (count - 1))


def frechet_replicates(features: Tensor, reference: Tensor, weights: np.ndarray) -> np.ndarray:
    """[R]: `frechet_distance` of features [N, D], weighed by [R, N] (rows that sum to 1), to a fixed reference [M, D].

    The covariances of the features divide by 1 − Σ w², which is N − 1 over N for equal weights.
    """
    a, b = features.double(), reference.double()
    mean_b, cov_b = b.mean(0), b.T.cov()
    root, trace_b = _root(cov_b), cov_b.trace()
    found = []
    for row in torch.from_numpy(weights):
        kept = row > 0
        w, x = row[kept], a[kept]
        mean = w @ x
        scaled = (x - mean) * (w / (1 - w.square().sum())).sqrt()[:, None]
        # tr (C_a C_b)^½ is the sum of singular values of A C_b^½, where C_a = AᵀA: the smaller Gram matrix has them.
        turned = scaled @ root
        gram = turned @ turned.T if len(turned) < turned.shape[1] else turned.T @ turned
        cross = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
        found.append(float((mean - mean_b).square().sum() + scaled.square().sum() + trace_b - 2 * cross))
    return np.array(found)


def kernel_replicates(features: Tensor, reference: Tensor, weights: np.ndarray) -> np.ndarray:
    """[R]: `kernel_distance` of features [N, D], weighed by [R, N], to a fixed reference [M, D].

    A picture that a resample holds twice is not compared with itself: that would bias the distance upwards.
    """
    a, b = features.double(), reference.double()
    own = _kernel(a, a).fill_diagonal_(0).numpy()
    across = _kernel(a, b).mean(dim=1).numpy()
    pairs = 1 - np.square(weights).sum(axis=1)
    inner = np.einsum("ri,ij,rj->r", weights, own, weights, optimize=True)
    # A resample of one picture alone has no pair.
    inner = np.divide(inner, pairs, out=np.full_like(inner, np.nan), where=pairs > 1e-9)
    return inner + float(_off_diagonal_mean(_kernel(b, b))) - 2 * weights @ across

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


def frechet_replicates(
    features: Tensor, reference: Tensor, weights: np.ndarray, others: np.ndarray | None = None
) -> np.ndarray:
    """[R]: `frechet_distance` of features [N, D], weighed by [R, N], to a reference [M, D], weighed by `others` [R, M].

    Rows of weights sum to 1; `others` None weighs all of the reference alike. Covariances divide by 1 − Σ w², which is
    (N − 1) / N for equal weights. A resampled reference makes the interval one over other real pictures too.
    """
    a, b, found = features.double(), reference.double(), []
    everything = _centred(b, np.full(len(b), 1 / len(b)))
    for number, row in enumerate(weights):
        mean_a, scaled_a = _centred(a, row)
        mean_b, scaled_b = everything if others is None else _centred(b, others[number])
        # With C_a = AᵀA and C_b = BᵀB, tr (C_a C_b)^½ is the sum of singular values of A Bᵀ.
        turned = scaled_a @ scaled_b.T
        gram = turned @ turned.T if len(turned) < turned.shape[1] else turned.T @ turned
        cross = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
        spread = scaled_a.square().sum() + scaled_b.square().sum()
        found.append(float((mean_a - mean_b).square().sum() + spread - 2 * cross))
    return np.array(found)


def _centred(features: Tensor, weights: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean [D], and a factor A of the covariance AᵀA, [K, D], of the K features that weigh anything."""
    row = torch.from_numpy(weights)
    kept = row > 0
    w, x = row[kept], features[kept]
    mean = w @ x
    return mean, (x - mean) * (w / (1 - w.square().sum())).sqrt()[:, None]


def kernel_replicates(
    features: Tensor, reference: Tensor, weights: np.ndarray, others: np.ndarray | None = None
) -> np.ndarray:
    """[R]: `kernel_distance` of features [N, D], weighed by [R, N], to a reference [M, D], weighed by `others` [R, M].

    A picture that a resample holds twice is not compared with itself: that would bias the distance upwards.
    `others` None weighs all of the reference alike.
    """
    a, b = features.double(), reference.double()
    across, sides = _kernel(a, b).numpy(), ((weights, a), (others, b))
    inner = []
    for side, x in sides:
        rows = np.full((1, len(x)), 1 / len(x)) if side is None else side
        own = _kernel(x, x).fill_diagonal_(0).numpy()
        pairs = 1 - np.square(rows).sum(axis=1)
        total = np.einsum("ri,ij,rj->r", rows, own, rows, optimize=True)
        # A resample of one picture alone has no pair.
        inner.append(np.divide(total, pairs, out=np.full_like(total, np.nan), where=pairs > 1e-9))
    between = weights @ across
    beside = between.mean(axis=1) if others is None else (between * others).sum(axis=1)
    found: np.ndarray = inner[0] + inner[1] - 2 * beside
    return found


def frechet_together(features: Tensor, reference: Tensor, weights: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`frechet_replicates` of small sets, all R at once: many times as fast, and the same but for rounding.

    Args:
        features: [N, D].
        reference: [M, D].
        weights: [R, N], rows that sum to 1, each over two pictures or more.
        others: [R, M], likewise.
    """
    (a, w), (b, v) = ((x.double(), torch.from_numpy(rows)) for x, rows in ((features, weights), (reference, others)))
    spread = torch.zeros(len(w), dtype=torch.float64)
    means, scales = [], []
    for x, rows in ((a, w), (b, v)):
        mean = rows @ x
        scale = rows / (1 - rows.square().sum(dim=1, keepdim=True))
        spread += (scale * (x.square().sum(dim=1) - 2 * mean @ x.T + mean.square().sum(dim=1, keepdim=True))).sum(dim=1)
        means.append(mean)
        scales.append(scale.clamp_min(0).sqrt())
    m, n = means
    # Of centred pictures: ⟨x_i − m, y_j − n⟩, for every resample.
    inner = a @ b.T - (a @ n.T).T[:, :, None] - (m @ b.T)[:, None, :] + (m * n).sum(dim=1)[:, None, None]
    turned = scales[0][:, :, None] * inner * scales[1][:, None, :]
    gram = turned @ turned.mT if len(a) < len(b) else turned.mT @ turned
    cross = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum(dim=1)
    found: np.ndarray = ((m - n).square().sum(dim=1) + spread - 2 * cross).numpy()
    return found

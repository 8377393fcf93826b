"""The LoRA, or the sum of Kronecker products, that is nearest to a matrix in Frobenius norm."""

from __future__ import annotations

import torch
from torch import Tensor

from libreflux.adapter.factors import lokr_shapes
from libreflux.model.device import with_fp64


def nearest_lora(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, in], r = min(rank, out, in), whose product is nearest to delta.

    The truncated singular value decomposition is the nearest of this rank (Eckart and Young 1936). The singular values
    are shared between both: up and down have the same norm, component by component.

    Args:
        delta: [out, in], a difference of weights.
        rank: >= 1.

    Returns:
        fp32, on delta's device.
    """
    up, down = _dominant(delta, min(rank, *delta.shape))
    return up.to(delta.device, torch.float32), down.to(delta.device, torch.float32)


def nearest_kroneckers(delta: Tensor, factor: int, terms: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Pairs w1 [a, b], w2 [c, d] whose sum of kron(w1, w2) is nearest to delta, the largest term first.

    Van Loan and Pitsianis 1993, "Approximation with Kronecker products": with block (i, j) of delta as row i b + j of a
    matrix R [a b, c d], kron(w1, w2) becomes vec(w1) vec(w2)^T. The best sum of k products is R's best rank k.

    Args:
        delta: [out, in].
        factor: wished size of w1, see `factors.factorization`.
        terms: how many products, at most a b and c d.

    Returns:
        `terms` pairs, fewer where the shapes allow fewer; fp32, on delta's device.
    """
    out_features, in_features = delta.shape
    (a, b), (c, d) = lokr_shapes(in_features, out_features, factor)
    rearranged = delta.reshape(a, c, b, d).permute(0, 2, 1, 3).reshape(a * b, c * d)
    left, right = _dominant(rearranged, min(terms, a * b, c * d))
    return [
        (
            left[:, term].reshape(a, b).to(delta.device, torch.float32),
            right[term].reshape(c, d).to(delta.device, torch.float32),
        )
        for term in range(left.shape[1])
    ]


def _dominant(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left [m, r] and right [r, n] in fp64, whose product is the best approximation of this rank.

    By the eigenvectors of the smaller Gram matrix, in fp64: what that loses to a whole decomposition is a component
    1e-8 times smaller than the largest, and it needs no more than the smaller side squared.
    """
    wide = with_fp64(matrix).double()
    if wide.shape[0] > wide.shape[1]:
        left, right = _dominant(wide.T, rank)
        return right.T, left.T
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)
    right = vectors.T @ wide
    root = torch.linalg.vector_norm(right, dim=1).sqrt()
    return vectors * root, right / root.clamp_min(torch.finfo(torch.float64).tiny)[:, None]

"""Whether attention's gradients are right here: torch's kernels against the plain formula, before hours depend on it.

The inputs are those on which released kernels failed: lengths that are no multiple of a kernel's tile, with and without
a mask, strided as FLUX passes them, and one row of queries whose logits are all about -100 (its logsumexp is then below
-88.7, where exp(-logsumexp) is no fp32 number any more).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from libreflux import seeding
from libreflux.errors import RunError
from libreflux.model.numerics import pinned

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Relative error, in the Frobenius norm, above which a gradient is wrong: about ten times what right kernels show
(bf16 on an H100: 0.4 %), and far below what wrong ones did (NaN, or of the order of one)."""
_ROWS = 512  # of queries that the plain formula holds at a time
_LOW = 100.0


def lengths_to_check(shortest: int, longest: int) -> list[int]:
    """Both ends, and the first lengths from the shortest on that are 64 and 7 modulo 128."""
    return sorted({shortest, longest, *(shortest + (rest - shortest) % 128 for rest in (64, 7))})


def check_gradients(
    *, head_dim: int, dtype: torch.dtype, lengths: Sequence[int], device: torch.device | str = "cuda"
) -> float:
    """Compares the gradients of a head with the plain formula, under `numerics.pinned`.

    Args:
        head_dim: size of a head, D.
        dtype: of queries, keys and values.
        lengths: of the sequences, text and image together; see `lengths_to_check`.
        device: where the run computes.

    Returns:
        The largest relative error found.

    Raises:
        RunError: a gradient is not finite or off by more than `TOLERANCE`; the line names torch's and cuDNN's versions.
    """
    worst = 0.0
    for length, masked in [(length, masked) for length in lengths for masked in (False, True)]:
        for name, error in _errors(head_dim, dtype, length, masked, torch.device(device)):
            if not error <= TOLERANCE[dtype]:  # NaN is not below
                told = "is not finite" if not math.isfinite(error) else f"is off by {error:.1%}"
                where = f"{length} tokens{' under a mask' if masked else ''}, head of {head_dim}, {_short(dtype)}"
                raise RunError(
                    f"the gradient of attention's {name} {told} here ({versions()}; {where})",
                    where=f"device {device}",
                    hint="use another version of torch; device: cpu trains right",
                )
            worst = max(worst, error)
    return worst


def versions() -> str:
    """torch's and cuDNN's, for a line."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return f"torch {torch.__version__}, cuDNN {cudnn or 'none'}"


def told(head_dim: int, dtype: torch.dtype, lengths: Sequence[int], worst: float) -> str:
    """One line on a check that was passed."""
    ends = f"{lengths[0]} to {lengths[-1]} tokens"
    return (
        f"attention's gradients agree with the plain formula to {worst:.1e} "
        f"(head of {head_dim}, {_short(dtype)}, {ends}, with and without a mask; {versions()})"
    )


def _errors(
    head_dim: int, dtype: torch.dtype, length: int, masked: bool, device: torch.device
) -> Iterator[tuple[str, float]]:
    """(name, relative error) of the gradients by queries, keys and values."""
    query, key, value, upstream = (one.to(device, dtype) for one in check_inputs(head_dim, length))
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
    if masked and length > 2:
        mask[..., 1 : max(2, length // 16)] = False  # the padding of a short prompt, in the middle of the sequence
    # The head twice, [1, S, 2, D], turned as diffusers' FLUX does: neither inputs nor the gradient are contiguous then.
    leaves = [one[None, :, None].repeat(1, 1, 2, 1).requires_grad_() for one in (query, key, value)]
    with pinned(device), torch.enable_grad():
        q, k, v = (one.transpose(1, 2) for one in leaves)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if masked else None)
        found = torch.autograd.grad(out.transpose(1, 2).flatten(2, 3), leaves, upstream[None].repeat(1, 1, 2))
        wanted = plain_gradients(query.float(), key.float(), value.float(), upstream.float(), mask.flatten())
    norm = torch.linalg.vector_norm
    for name, got, right in zip(("queries", "keys", "values"), found, wanted, strict=True):
        worst = (norm(got[0].float() - right[:, None], dim=(0, 2)) / norm(right)).max()  # of both, NaN above all
        yield name, float(worst)


def plain_gradients(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <upstream, softmax(Q K^T / sqrt(D)) V> by Q, K and V, some rows of Q at a time.

    With P the softmax and dP = U V^T: dV = P^T U, dS = P (dP - rowsum(P dP)), dQ = dS K / sqrt(D) and
    dK = dS^T Q / sqrt(D) (Dao et al. 2022, arXiv:2205.14135, appendix B.2).

    Args:
        query, key, value, upstream: [S, D] fp32.
        seen: [S] bool, the keys that queries see; at least one.
    """
    scale = query.shape[1] ** -0.5
    by_query, by_key, by_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for start in range(0, len(query), _ROWS):
        here = slice(start, start + _ROWS)
        weights = (scale * query[here] @ key.T).masked_fill(~seen, -math.inf).softmax(dim=-1)
        by_value += weights.T @ upstream[here]
        by_weights = upstream[here] @ value.T
        by_scores = weights * (by_weights - (weights * by_weights).sum(dim=-1, keepdim=True))
        by_query[here] = scale * by_scores @ key
        by_key += scale * by_scores.T @ query[here]
    return by_query, by_key, by_value


def check_inputs(head_dim: int, length: int) -> list[Tensor]:
    """Queries, keys, values and the gradient that comes in, [S, D] fp32 on the CPU, the same everywhere."""
    generator = seeding.generator(0, "attention-check", head_dim, length)
    query, key, value, upstream = (torch.randn(length, head_dim, generator=generator) for _ in range(4))
    key[:, 0] = 1.0
    query[:, 0] = 0.0
    query[-1, 0] = -_LOW * math.sqrt(head_dim)
    return [query, key, value, upstream]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]

"""The check of attention's gradients: right kernels pass, each kind of wrong one that was released is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from libreflux.errors import RunError
from libreflux.model.attention import check_gradients, check_inputs, lengths_to_check, plain_gradients, told


def test_lengths_are_the_ends_and_what_tiles_leave_over() -> None:
    assert lengths_to_check(65, 200) == [65, 135, 192, 200]
    assert lengths_to_check(64, 64) == [64, 135]
    assert {length % 128 for length in lengths_to_check(1025, 4608)} == {1, 7, 64, 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_right_gradients_pass(dtype: torch.dtype, head_dim: int) -> None:
    worst = check_gradients(head_dim=head_dim, dtype=dtype, lengths=[2, 7, 65, 192], device="cpu")
    assert 0 < worst < {torch.float32: 1e-4, torch.bfloat16: 0.01}[dtype]
    assert told(head_dim, dtype, [65, 192], worst).count("\n") == 0


def test_the_plain_formula_is_autograds() -> None:
    torch.manual_seed(0)
    query, key, value, upstream = (torch.randn(700, 8, dtype=torch.float64) for _ in range(4))
    seen = torch.ones(700, dtype=torch.bool)
    seen[3:90] = False
    leaves = [one.clone().requires_grad_() for one in (query, key, value)]
    scores = (leaves[0] @ leaves[1].T / math.sqrt(8)).masked_fill(~seen, -math.inf)
    wanted = torch.autograd.grad(scores.softmax(-1) @ leaves[2], leaves, upstream)
    for got, right in zip(plain_gradients(query, key, value, upstream, seen), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)


def test_one_row_is_where_kernels_overflowed() -> None:
    """Its logsumexp is below -ln of the largest fp32 number, also in bf16."""
    query, key, _, _ = (one.to(torch.bfloat16).double() for one in check_inputs(64, 192))
    assert torch.logsumexp(query[-1] @ key.T / 8, dim=0) < -88.73
    assert bool((torch.logsumexp(query[:-1] @ key.T / 8, dim=1) > 0).all())


class _Wrong(torch.autograd.Function):
    """Attention's own forward pass, and a backward pass that `spoil` has a hand in."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spoil: Any) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.spoil = mask, spoil
        return REAL(query, key, value, attn_mask=mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [one.detach().requires_grad_() for one in ctx.saved_tensors]
        query, key, value = leaves
        with torch.enable_grad():
            out = REAL(query, key, value, attn_mask=ctx.mask)
        return *ctx.spoil(list(torch.autograd.grad(out, leaves, grad)), *leaves, ctx.mask), None, None


REAL = F.scaled_dot_product_attention
Gradients = list[Tensor]


def overflowing(gradients: Gradients, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Gradients:
    """pytorch issue 196678: NaN by queries where the length is 64 modulo 128, under a mask, for low rows."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    low = torch.logsumexp(scores.float(), dim=-1, keepdim=True) < -88.73
    if mask is not None and query.shape[-2] % 128 == 64:
        gradients[0] = gradients[0].masked_fill(low, math.nan)
    return gradients


def other_strides(gradients: Gradients, *_: Any) -> Gradients:
    """pytorch PR 171627: the gradient that comes in is read as if it were contiguous."""
    gradients[2] = gradients[2].flip(-2)
    return gradients


def last_tile_left_out(gradients: Gradients, *_: Any) -> Gradients:
    if gradients[1].shape[-2] % 128 == 7:
        gradients[1] = gradients[1].clone()
        gradients[1][..., -7:, :] = 0
    return gradients


def mask_ignored(gradients: Gradients, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Gradients:
    return gradients if mask is None else [one * 1.1 for one in gradients]


@pytest.mark.parametrize(
    ("spoil", "name", "said"),
    [
        (overflowing, "queries", "is not finite here"),
        (other_strides, "values", "is off by"),
        (last_tile_left_out, "keys", "135 tokens"),
        (mask_ignored, "queries", "under a mask"),
    ],
)
def test_planted_wrong_gradients_are_refused(
    spoil: Callable[..., Gradients], name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        made: Tensor = _Wrong.apply(query, key, value, attn_mask, spoil)
        return made

    monkeypatch.setattr(F, "scaled_dot_product_attention", planted)
    with pytest.raises(RunError) as refused:
        check_gradients(head_dim=64, dtype=torch.bfloat16, lengths=lengths_to_check(65, 200), device="cpu")
    line = str(refused.value)
    assert f"attention's {name}" in line
    assert said in line
    assert torch.__version__ in line
    assert "cuDNN" in line
    assert "hint" in line
    assert "\n" not in line

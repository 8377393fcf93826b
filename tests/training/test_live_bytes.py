"""What is alive is counted alike on the meta device, where like operations run once, and on the CPU, where all run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libreflux.training.live_bytes import LiveBytes


def _in_fp64(work: Callable[[], Tensor]) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return work()
    finally:
        torch.set_default_dtype(before)


CASES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "views share their storage": lambda a, b: [a.view(-1), a.t().contiguous(), a.unsafe_chunk(2), a[1:], a.flatten()],
    "a part of a storage": lambda a, b: (a + b)[:2].clone(),
    "in place": lambda a, b: a.clone().add_(b).mul_(2).copy_(b),
    "into a given tensor": lambda a, b: torch.add(a, b, out=torch.empty_like(a)),
    "one and one": lambda a, b: [a.long() * 1, a.long() * 1.0, a.long() * True],
    "several results": lambda a, b: F.layer_norm(a, a.shape[-1:]) + a.max(dim=0)[0],
    "by names": lambda a, b: [torch.add(input=a, other=b), torch.add(input=a, other=b, alpha=2)],
    "broadcast": lambda a, b: [a.expand(3, *a.shape), a.expand(3, *a.shape) + b],
    "other dtypes": lambda a, b: [a.to(torch.bfloat16), a.to(torch.float64), a.to(torch.float32)],
    "transposed": lambda a, b: [a.t() + b.t(), a + b, a.t() @ b],
    "in place, of another shape": lambda a, b: [a.clone().unsqueeze_(0) + 1, a.clone().t_() + 1, a[0] @ b.t()],
    "onto another device": lambda a, b: torch.zeros_like(a, device="cpu"),
    "another default": lambda a, b: [a.long() * 1.0, _in_fp64(lambda: a.long() * 1.0)],
    "backward": lambda a, b: [(a.detach().requires_grad_() @ b.t()).square().sum().backward() for _ in range(2)],
}


@pytest.mark.parametrize("case", CASES)
def test_like_operations_are_counted_as_if_they_ran(case: str) -> None:
    def counted(device: str) -> list[object]:
        a, b = torch.ones(4, 6, device=device), torch.ones(4, 6, device=device)
        found: list[object] = []
        with LiveBytes() as live:
            for _ in range(3):
                kept = CASES[case](a, b)
                found += [live.live, live.peak]
                found += [(one.shape, one.dtype) for one in tree_leaves(kept) if isinstance(one, Tensor)]
                del kept
            found.append(live.live)
        return found

    assert counted("meta") == counted("cpu")


class Asked(TorchDispatchMode):
    """Names of the operations that come through."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_like_operation_is_not_asked_again() -> None:
    a = torch.ones(4, 6, device="meta")
    with Asked() as asked, LiveBytes():
        results = [a * 2, a * 2, a * 2.0, a.t() * 2]
    assert asked.names.count("aten.mul.Tensor") == 3
    assert [one.stride() for one in results] == [(6, 1), (6, 1), (6, 1), (1, 6)]

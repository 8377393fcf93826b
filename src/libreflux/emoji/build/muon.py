"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, steps: int = 4) -> Tensor:
    """[K, m, n] with its singular values brought near 1 by quintic Newton-Schulz steps, in fp32.

    Every step multiplies by a polynomial of x xᵀ, and polynomials of one matrix commute: all of them are found from the
    small square x xᵀ, and x is multiplied once.
    """
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram, same = x @ x.mT, torch.eye(x.shape[-2], device=x.device)
    product = same
    for step in range(steps):
        factor = 3.4445 * same - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product if step else factor
        if step + 1 < steps:
            gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; kernels of convolutions count as [out, in·h·w].

    Updates are scaled by 0.2 √max(m, n), so that their root mean square is AdamW's and one rate serves both
    (Liu et al. 2025, eq. 4).
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["exp_avg"], group["momentum"]).flatten(1)
                alike[ahead.shape].append((parameter, ahead))
            for shape, pairs in alike.items():
                updates = orthogonalise(torch.stack([ahead for _, ahead in pairs]))
                scale = 0.2 * max(shape) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.sub_(update.reshape(parameter.shape), alpha=group["lr"] * scale)

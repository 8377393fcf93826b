"""How large the gradient of each linear layer's weight is, without a gradient of the model's size in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from libreflux.model.device import with_fp64


@contextmanager
def squared_gradients(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the block, a forward pass of one sample and its backward fill a dict: layer -> ||dL/dW||^2, fp64.

    W is what the layer multiplies its input with: a dense weight, an int8 one, or one with an adapter on it. No
    parameter needs a gradient, and none gets one: dL/dW = g^T x is made of the layer's input x [T, in] and of its
    output's gradient g [T, out]. x is saved as autograd saves it: with gradient checkpointing it is computed again.
    Where there are few tokens not even g^T x is made: ||g^T x||^2 = sum of (x x^T) * (g g^T), element by element.

    Args:
        layers: name -> linear, e.g. `adapter.layers.linears(transformer)`.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def made(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            if not out.requires_grad:  # nothing before this layer needs a gradient
                out.requires_grad_(True)
            watched: Tensor = _Watched.apply(out, args[0], lambda x, g: _add(found, name, x, g))
            return watched

        return layer.register_forward_hook(made).remove

    with ExitStack() as held:
        for name, layer in layers.items():
            held.callback(watch(name, layer))
        yield found


class _Watched(torch.autograd.Function):
    """A layer's output as it is, whose gradient is told together with the layer's input."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, tell: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tell = tell
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        [x] = ctx.saved_tensors
        ctx.tell(x.detach(), g.detach())
        return g, None, None


def _add(found: dict[str, Tensor], name: str, x: Tensor, g: Tensor) -> None:
    found[name] = found.get(name, torch.zeros((), dtype=torch.float64)) + squared_norm(x, g).cpu()


def squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """||g^T x||^2 of x [..., in] and g [..., out], their first dimensions taken as one."""
    rows, errors = (each.reshape(-1, each.shape[-1]).to(torch.float32) for each in (x, g))
    tokens, sides = rows.shape[0], (rows.shape[1], errors.shape[1])
    if tokens * sum(sides) < sides[0] * sides[1]:
        return with_fp64((rows @ rows.T) * (errors @ errors.T)).sum(dtype=torch.float64).clamp_min(0)
    return torch.linalg.vector_norm(with_fp64(errors.T @ rows), dtype=torch.float64).square()

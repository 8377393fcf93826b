"""The gradient of a step: one flat fp32 vector over all that is trained, its sum over passes, its norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from libreflux.adapter.adapter import Adapter
from libreflux.adapter.targets import group
from libreflux.model.device import with_fp64

AT_ONCE = 2**25
"""Numbers of gradients that a card copies together before it adds them."""
_PART = 1 << 22  # numbers that a CPU widens to fp64 together
_ROW = 1 << 12


def accumulate_gradient(total: Tensor, parameters: Iterable[nn.Parameter], *, at_once: int | None = None) -> None:
    """Adds the parameters' gradients to a flat fp32 vector [P], in their order, and forgets them.

    In fp32 whatever the parameters' dtype: eight passes summed in bf16 would each be rounded to 8 bits.

    Args:
        total: the vector.
        parameters: of one dtype.
        at_once: numbers that are copied together and then added, two launches for many parameters; None: `AT_ONCE` on
            a card, and one parameter after the other on a CPU.
    """
    if at_once is None:
        at_once = 0 if total.device.type == "cpu" else AT_ONCE
    offset = 0
    for run in runs(parameters, at_once):
        size = sum(parameter.numel() for parameter in run)
        into = total[offset : offset + size]
        found = [parameter.grad for parameter in run]
        flat = [grad.reshape(-1) for grad in found if grad is not None]
        if len(run) == len(flat) > 1:
            into.add_(torch.cat(flat))
        else:
            for part, grad in zip(into.split([parameter.numel() for parameter in run]), found, strict=True):
                if grad is not None:
                    part.add_(grad.reshape(-1))
        for parameter in run:
            parameter.grad = None
        offset += size


def runs(parameters: Iterable[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours of at most `size` numbers together, or single ones."""
    run: list[nn.Parameter] = []
    count = 0
    for parameter in parameters:
        if run and count + parameter.numel() > size:
            yield run
            run, count = [], 0
        run.append(parameter)
        count += parameter.numel()
    if run:
        yield run


def group_norms(gradient: Tensor, adapter: Adapter) -> dict[str, float]:
    """The norm of a flat gradient [P], in the adapter's order, by layer; like layers of all blocks are one group."""
    sizes = [sum(parameter.numel() for parameter in layer.delta.parameters()) for layer in adapter.layers.values()]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in with_fp64(gradient).split(sizes)]
    squares: dict[str, float] = {}
    for name, norm in zip(adapter.layers, torch.stack(norms).tolist(), strict=True):  # one wait for the device
        squares[group(name)] = squares.get(group(name), 0.0) + norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


def flat_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """All gradients as one fp32 vector [P], in the parameters' order; a parameter without one counts as zeros."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(torch.float32) for p in parameters]
    )


def clip_grad_norm(gradient: Tensor, max_norm: float | None) -> float:
    """Scale a flat gradient [P] in place so that its 2-norm is at most max_norm (None: leave it).

    Returns:
        The norm before clipping; nan or inf, and nothing scaled, if some of the gradient is not finite.
    """
    norm = float(torch.linalg.vector_norm(_norms(gradient)))
    if max_norm is not None and math.isfinite(norm) and norm > max_norm:
        gradient.mul_(max_norm / norm)
    return norm


def _norms(gradient: Tensor) -> Tensor:
    """2-norms of the parts of a flat gradient, fp64.

    fp64, since torch's fp32 norm of 1e8 numbers carries an error that depends on the thread count. In parts, since
    torch makes an fp64 copy of what it is given, which for a 1 B slice's gradient was the peak of the whole step
    (600 MiB). On a card without a copy or a launch for every part.
    """
    if gradient.device.type == "cuda":
        return row_norms(gradient)
    parts = [torch.linalg.vector_norm(with_fp64(part), dtype=torch.float64) for part in gradient.split(_PART)]
    return torch.stack(parts)


def row_norms(gradient: Tensor) -> Tensor:
    """2-norms of rows of 4096 numbers of a flat gradient, each summed in fp32, which errs by less than 1e-5; as fp64.

    Infinite where a square of fp32 is, from 1.8e19 on.
    """
    whole = gradient.numel() // _ROW * _ROW
    rows = [gradient[:whole].view(-1, _ROW), gradient[None, whole:]]
    return torch.cat([torch.linalg.vector_norm(row, dim=-1).double() for row in rows])

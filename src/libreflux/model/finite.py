"""Numbers that are not finite: found before they are written on or shown, and traced to where they came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from libreflux.errors import LibrefluxError

DAMAGED = "the file is damaged: copy or download it again"


class NotFiniteError(LibrefluxError):
    """Infinite or NaN, where only numbers mean something."""


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; without a temporary of its size. What lies on meta has none."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()  # NaN is in both
    return bool(low.isfinite() & high.isfinite())


def not_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a number that is not finite."""
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return next((name for name, tensor in pairs if not is_finite(tensor)), None)


def check_weights(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raises NotFiniteError for a weight that is NaN or infinite: whoever reads the new file would not know why."""
    if name := not_finite(tensors):
        raise NotFiniteError(f"{name} is not finite", where=where, hint=DAMAGED)


def each_finite(tensors: Iterable[tuple[str, Tensor]], where: object) -> Iterator[tuple[str, Tensor]]:
    """The same pairs, each checked as by `check_weights` when its turn comes."""
    for name, tensor in tensors:
        check_weights({name: tensor}, where)
        yield name, tensor


def name_of(part: nn.Module) -> str | None:
    """What diffusers or we noted of where a part was read from."""
    return dict(getattr(part, "config", None) or {}).get("_name_or_path") or None

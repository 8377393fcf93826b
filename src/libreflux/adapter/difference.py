"""What is between two models, or what an adapter adds to one: tensor by tensor, one in memory at a time."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from libreflux.adapter.io import AdapterFile
from libreflux.adapter.layers import LoKr, LoRA, delta_from_tensors, delta_norm, delta_weight
from libreflux.adapter.reading import check_strength
from libreflux.errors import ModelError
from libreflux.model.weight_reader import WeightReader

Kind = Literal["weight", "bias", "norm"]


@dataclass(frozen=True)
class Change:
    """One tensor of a model, and by how much another one differs from it; Frobenius norms.

    Attributes:
        name: diffusers' name of the tensor.
        kind: "weight" of a linear layer, which an adapter can hold; "bias"; "norm": of an attention norm.
        shape: of the tensor.
        norm: of the tensor itself, ||W||.
        change: of the difference, ||dW||.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    norm: float
    change: float

    @property
    def layer(self) -> str:
        """The layer that has the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def relative(self) -> float:
        """||dW|| / ||W||; 0 where nothing changed, infinite where something came of zeros."""
        if self.change == 0:
            return 0.0
        return self.change / self.norm if self.norm else math.inf


def together(changes: Sequence[Change]) -> float:
    """||dW|| / ||W|| of several tensors taken as one."""
    norm, change = (math.sqrt(sum(getattr(one, key) ** 2 for one in changes)) for key in ("norm", "change"))
    return change / norm if norm else 0.0 if change == 0 else math.inf


class Difference(abc.ABC):
    """What must be added to a model's tensors.

    Args:
        before: the model's.
    """

    def __init__(self, before: WeightReader) -> None:
        self.before = before

    def changes(self, on_tensor: Callable[[int, int], None] = lambda done, total: None) -> list[Change]:
        """Each tensor of the model, in its order.

        Args:
            on_tensor: told how many of how many are done.

        Raises:
            ModelError: a tensor that cannot be read.
            NotFiniteError: one that is NaN or infinite.
        """
        found, linears = [], set(self.before.linears)
        with self.reading():
            for name, shape in self.before.shapes.items():
                layer, _, attribute = name.rpartition(".")
                kind: Kind = "norm" if layer not in linears else "weight" if attribute == "weight" else "bias"
                norm = _norm(self.before.read(name))
                found.append(Change(name, kind, shape, norm, self.size(name)))
                on_tensor(len(found), len(self.before.shapes))
        return found

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads all tensors: files with checksums are compared beside it."""
        with self.before.verified():
            yield

    @abc.abstractmethod
    def delta(self, name: str) -> Tensor:
        """What is added to this tensor, fp32, of its shape."""

    def size(self, name: str) -> float:
        """Frobenius norm of `delta`."""
        return _norm(self.delta(name))


class ModelDifference(Difference):
    """Another model's tensors less the model's.

    Args:
        before, after: the models', of the same shapes.

    Raises:
        ModelError: they have other layers or shapes.
    """

    def __init__(self, before: WeightReader, after: WeightReader) -> None:
        super().__init__(before)
        self.after = after
        hint = "compare models of one architecture"
        for one, other in ((before, after), (after, before)):
            if lacking := next((name for name in one.shapes if name not in other.shapes), None):
                raise ModelError(f"has no {lacking}, which {one.where} has", where=other.where, hint=hint)
        for name, shape in before.shapes.items():
            if shape != after.shapes[name]:
                told = f"{name} is {after.shapes[name]}, in {before.where} {shape}"
                raise ModelError(told, where=after.where, hint=hint)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """See `Difference.reading`."""
        with ExitStack() as held:
            held.enter_context(self.before.verified())
            if self.after.where != self.before.where:
                held.enter_context(self.after.verified())
            yield

    def delta(self, name: str) -> Tensor:
        """See `Difference.delta`."""
        return self.after.read(name) - self.before.read(name)


class AdapterDifference(Difference):
    """What an adapter adds to a model.

    Args:
        before: the model's tensors.
        file: the adapter.
        weight: its strength.

    Raises:
        AdapterError: it does not fit the model.
    """

    def __init__(self, before: WeightReader, file: AdapterFile, weight: float = 1.0) -> None:
        super().__init__(before)
        self.weight = weight
        self._deltas: dict[str, LoKr | LoRA] = {}
        for layer, tensors in file.by_layer(before.linears).items():
            out_features, in_features = before.shapes[f"{layer}.weight"]
            where = f"{file.where}, {layer}"
            delta = delta_from_tensors(tensors, in_features, out_features, where)
            check_strength(delta, weight, where)
            self._deltas[f"{layer}.weight"] = delta

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """See `Difference.delta`."""
        if name not in self._deltas:
            return torch.zeros(self.before.shapes[name])
        return self.weight * delta_weight(self._deltas[name]).detach().to(torch.float32)

    def size(self, name: str) -> float:
        """See `Difference.size`; nothing is built for it."""
        return abs(self.weight) * delta_norm(self._deltas[name]) if name in self._deltas else 0.0


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))

"""Adapters on a pipeline, by the names that diffusers has for it: LoRA and LoKr, and the facts follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux.adapter.adapter import Adapter
from libreflux.adapter.checks import check_base, notice_training_adapter, refuse_training_adapter
from libreflux.adapter.facts import adapted_facts
from libreflux.adapter.io import AdapterFile, attach_file, load_adapter
from libreflux.adapter.layers import AdaptedLinear
from libreflux.errors import ModelError, RecipeError
from libreflux.model.facts import Facts, tell_facts
from libreflux.model.source import source_of
from libreflux.printing import counted

_LOADED = "_libreflux_adapters"
"""Where a transformer keeps what was loaded on it: pipelines that share it share that."""


@dataclass
class _Loaded:
    adapter: Adapter
    file: AdapterFile
    weight: float
    used: bool = True


class Adapting:
    """Loads, weighs and unloads adapters of `transformer`; `facts` are those under what is loaded."""

    transformer: Any
    _own: Facts
    _set: tuple[Facts, tuple[str, ...]] | None = None

    @property
    def facts(self) -> Facts:
        """What is used where a call says nothing: the model's own facts, under the adapters that are loaded.

        An adapter that `set_adapters` leaves out has no say. Facts that are set hold until an adapter is loaded or
        unloaded.
        """
        loaded = self._loaded()
        if self._set is not None and self._set[1] == tuple(loaded):
            return self._set[0]
        return adapted_facts(self._own, [(one.file, one.weight) for one in loaded.values() if one.used])

    @facts.setter
    def facts(self, facts: Facts) -> None:
        loaded = tuple(self._loaded())
        self._set = (facts, loaded)
        if not loaded:
            self._own = facts
            tell_facts(self.transformer, facts)  # for the next pipeline over it

    def load_lora_weights(
        self,
        path: str | Path | AdapterFile,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        weight: float = 1.0,
    ) -> None:
        """Put a LoRA or LoKr on the transformer, which is frozen; several add up.

        Text padding, tokens, steps and guidance become those that the adapter was trained for, where it says so. One
        that was trained on other weights than the transformer's is loaded, and told.

        Args:
            path: an adapter file of any kind that libreflux reads, or the folder of `weight_name`; or what
                `libreflux.load_adapter` gave. Nothing is downloaded.
            adapter_name: what `set_adapters` calls it; None is default_0, default_1 and so on.
            weight_name: the file in that folder.
            weight: its strength.

        Raises:
            AdapterError: no such file, a training adapter, one that does not fit, or one trained with another text
                padding than those here, or on this model with an adapter merged in that is not here.
            RecipeError: a path or a weight that is none, a `weight_name` beside an adapter that is read already, or a
                name that is taken.
            ModelError: the transformer's weights are offloaded layer by layer.
        """
        loaded = self._loaded()
        name = f"default_{len(loaded)}" if adapter_name is None else adapter_name
        if name in loaded:
            raise RecipeError(f"an adapter is called {name!r} already", where="adapter_name", hint="use another name")
        if any(parameter.is_meta for parameter in self.transformer.parameters()):
            hint = "load adapters before enable_sequential_cpu_offload()"
            raise ModelError("the transformer's weights are offloaded layer by layer", hint=hint)
        strength, file = _weight(weight), _read(path, weight_name)
        refuse_training_adapter(file)
        adapted_facts(self._own, [(one.file, one.weight) for one in loaded.values()] + [(file, strength)])  # or refuses
        source = source_of(self.transformer)
        if source is not None and "model_hash" in file.metadata:  # else nothing is read for it
            check_base(source, source.hash, [file], [one.file for one in loaded.values()])
        notice_training_adapter([file])
        loaded[name] = _Loaded(attach_file(self.transformer, file, strength), file, strength)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Use these adapters alone, at these weights (one for all, or one each); the others stay loaded at 0.

        The facts are then those of the adapters in use.

        Raises:
            RecipeError: a name that is not loaded, or weights that are not as many.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        loaded = self._loaded()
        if unknown := [name for name in names if name not in loaded]:
            here = ", ".join(loaded) or "none"
            raise RecipeError(f"no adapter is called {unknown[0]!r}", where="adapter_names", hint=f"loaded: {here}")
        if len(given) != len(names):
            raise RecipeError(
                f"{counted(len(given), 'weight')} for {counted(len(names), 'adapter')}",
                hint="give one for all, or one each",
            )
        weights: Mapping[str, float] = {name: _weight(one) for name, one in zip(names, given, strict=True)}
        for name, one in loaded.items():
            one.weight, one.used = weights.get(name, 0.0), name in weights
            for layer in one.adapter.layers.values():
                layer.strength = one.weight

    def get_active_adapters(self) -> list[str]:
        """The names of the loaded adapters whose weight is not 0."""
        return [name for name, one in self._loaded().items() if one.weight]

    def unload_lora_weights(self) -> None:
        """Take all adapters that were loaded here off again; the facts become the model's own."""
        loaded = self._loaded()
        while loaded:
            loaded.popitem()[1].adapter.detach()

    def _loaded(self) -> dict[str, _Loaded]:
        """By name, in their order."""
        loaded: dict[str, _Loaded] | None = getattr(self.transformer, _LOADED, None)
        if loaded is None:
            loaded = {}
            setattr(self.transformer, _LOADED, loaded)
        return loaded

    def _refuse_adapted(self) -> None:
        """Raises ModelError where a file of the transformer would hold layers that no one else has."""
        if any(isinstance(module, AdaptedLinear) for module in self.transformer.modules()):
            hint = "unload_lora_weights() first, or make a model of both with `libreflux merge`"
            raise ModelError("adapters are on the transformer, which cannot be saved with them", hint=hint)


def _read(path: object, weight_name: str | None) -> AdapterFile:
    if isinstance(path, AdapterFile):
        if weight_name is not None:
            raise RecipeError("has no effect on an adapter that is read", where="weight_name", hint="remove it")
        return path
    if not isinstance(path, str | Path):  # diffusers takes tensors too
        raise RecipeError(f"is no path but a {type(path).__name__}", where="path", hint="name an adapter file")
    return load_adapter(Path(path) / weight_name if weight_name else path)


def _weight(value: float) -> float:
    try:
        strength = float(value)
    except (TypeError, ValueError, OverflowError):
        strength = float("nan")
    if isinstance(value, bool | str) or not abs(strength) < float("inf"):
        raise RecipeError(f"{value!r} is no weight", where="weight", hint="use a number such as 0.8")
    return strength

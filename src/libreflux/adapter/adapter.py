"""An adapter on a transformer: put on, switched off, taken off again; its tensors copied out and in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from libreflux.adapter.formats import lycoris_name
from libreflux.adapter.init import Kind, init_lokr, init_lora
from libreflux.adapter.layers import AdaptedLinear, LoKr, LoRA, features, linears
from libreflux.adapter.targets import Resolved
from libreflux.errors import AdapterError
from libreflux.model.switches import switched


class Adapter:
    """The adapted layers of one adapter on one transformer; the transformer itself is frozen.

    Attributes:
        layers: layer name -> AdaptedLinear, in the model's order.
    """

    def __init__(self, transformer: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
        self.transformer = transformer
        self.layers = dict(layers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(`<layer name>.lokr_w1`, parameter) pairs, in the model's order."""
        for name, layer in self.layers.items():
            for suffix, parameter in layer.delta.named_parameters():
                yield f"{name}.{suffix}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def key_map(self) -> dict[str, str]:
        """LyCORIS prefix -> layer name."""
        return {lycoris_name(name): name for name in self.layers}

    def state_dict(self) -> dict[str, Tensor]:
        """LyCORIS name -> tensor, sharing storage with the parameters."""
        return {
            f"{lycoris_name(name)}.{suffix}": tensor
            for name, layer in self.layers.items()
            for suffix, tensor in layer.delta.tensors().items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy back what `state_dict` gave, to the bit: a LoRA's alpha too.

        Raises:
            AdapterError: a missing or leftover key, or another shape or dtype.
        """
        own = self.state_dict()
        missing, leftover = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        if missing or leftover:
            raise AdapterError(
                f"missing {some_names(missing)}; leftover {some_names(leftover)}",
                hint="load it with the recipe it was trained by",
            )
        for key, tensor in tensors.items():
            if (tensor.shape, tensor.dtype) != (own[key].shape, own[key].dtype):
                found, wanted = f"{tuple(tensor.shape)} {tensor.dtype}", f"{tuple(own[key].shape)} {own[key].dtype}"
                raise AdapterError(f"is {found}, should be {wanted}", where=key)
        for key, tensor in tensors.items():
            own[key].copy_(tensor)
        for name, layer in self.layers.items():
            key = f"{lycoris_name(name)}.alpha"  # fp32 there, the live one is a double: equal ones stay as they are
            if isinstance(layer.delta, LoRA) and not torch.equal(tensors[key], torch.tensor(layer.delta.alpha)):
                layer.delta.rescale(float(tensors[key]))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The transformer without this adapter while the block runs; other adapters on the same layers stay.

        A gradient may pass through it, by its input: what gradient checkpointing computes again in a later backward
        has the adapter off too, see `model.switches`.
        """
        with switched([(layer, False) for layer in self.layers.values()]):
            yield

    def detach(self) -> None:
        """Take the adapter off again; other adapters on the same layers stay."""
        for name, layer in self.layers.items():
            parent, child = _parent(self.transformer, name)
            at: nn.Module = getattr(parent, child)
            if at is layer:
                setattr(parent, child, layer.base)
                continue
            while isinstance(at, AdaptedLinear) and at.base is not layer:
                at = at.base
            if not isinstance(at, AdaptedLinear):
                raise AdapterError("this adapter is not attached here any more", where=name)
            at.base = layer.base


def attach(
    transformer: nn.Module,
    resolved: Sequence[Resolved],
    *,
    dtype: torch.dtype = torch.float32,
    init: Kind = "perturbed",
    seed: int = 0,
    scale: float = 1e-3,
    device: torch.device | str | None = None,
) -> Adapter:
    """Freeze a transformer and put a new LoKr or LoRA on each resolved layer.

    Args:
        transformer: any module whose linears were resolved.
        resolved: from `targets.resolve`.
        dtype: of the adapter's parameters, fp32 or bf16.
        init: of a LoKr, see `init.init_lokr`; a LoRA has the one start of `init.init_lora`.
        seed: of the run.
        scale: of the perturbed init.
        device: of the adapter's parameters, and of what makes them; None: where each layer is.

    Returns:
        The adapter, whose parameters are the only ones that require gradients.
    """
    found = linears(transformer)
    layers: dict[str, AdaptedLinear] = {}
    for row in resolved:
        base = found.get(row.name)
        if base is None or features(base) != (row.in_features, row.out_features):
            raise AdapterError("was resolved for another model", where=row.name, hint="resolve the targets again")
        size: tuple[int, int] = (row.in_features, row.out_features)
        place = device_of(base) if device is None else device
        if row.rank is not None:
            lora = LoRA(*size, row.rank, alpha=row.alpha, dtype=dtype, device=place)
            layers[row.name] = AdaptedLinear(base, lora)
            init_lora(lora, seed, row.name)
        elif row.factor is not None:
            layers[row.name] = AdaptedLinear(base, LoKr(*size, row.factor, dtype=dtype, device=place))
            init_lokr(layers[row.name], init, seed, row.name, scale)
        else:
            raise AdapterError("comes from a file", where=row.name, hint="attach the file")
    return install(transformer, layers)


def install(transformer: nn.Module, layers: Mapping[str, AdaptedLinear]) -> Adapter:
    """Freeze a transformer and put these layers in the place of its own, by name."""
    transformer.requires_grad_(False)
    for name, layer in layers.items():
        parent, child = _parent(transformer, name)
        setattr(parent, child, layer)
    return Adapter(transformer, layers)


def _parent(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return root.get_submodule(path), child


def device_of(module: nn.Module) -> torch.device | None:
    """Where a layer's weights are; None for one without any."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return None if first is None else first.device


def some_names(keys: Sequence[str], count: int = 3) -> str:
    """The first of these names and how many more there are, for an error."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return (", ".join(keys[:count]) or "nothing") + more

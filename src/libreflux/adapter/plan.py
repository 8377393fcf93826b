"""From a recipe's `adapter` section to adapted layers: patterns, a preset, a LyCORIS config, or an adapter file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from libreflux.adapter import init, lycoris
from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.io import attach_file, load_adapter
from libreflux.adapter.layers import LoRA, delta_from_tensors, features, linear_shapes, linears
from libreflux.adapter.targets import Resolved, Target, resolve, table
from libreflux.errors import AdapterError
from libreflux.recipe import AdapterSpec

PRESETS: dict[str, tuple[Target, ...]] = {
    # 597.7 M parameters on FLUX.1
    "libreflux-600m": tuple(Target(layers=f"**.{part}.**", factor=3) for part in ("attn", "ff", "ff_context")),
    # 3,226.8 M parameters on FLUX.1
    "libreflux-3.2b": (Target(layers="transformer_blocks.0.**", factor=1), Target(layers="**", factor=2)),
}
"""Names of a recipe's `adapter.preset`, after the sizes of the two published trainings."""


@dataclass(frozen=True)
class Plan:
    """What an adapter section means for one model.

    Attributes:
        layers: in the model's order.
        matches: of a LyCORIS config, else empty.
    """

    layers: list[Resolved]
    matches: list[lycoris.Match]

    def text(self, width: int = 400) -> str:
        """The layers, in `width` characters, and what the entries of a LyCORIS config took, as aligned text."""
        parts = [table(self.layers, width)]
        if self.matches:
            parts.insert(0, lycoris.table(self.matches) + "\n")
        return "\n".join(parts)


def plan(spec: AdapterSpec, transformer: nn.Module) -> Plan:
    """The layers that an adapter section chooses.

    Args:
        spec: the recipe's.
        transformer: the model, on any device, the meta device included; it is left as it is.

    Raises:
        AdapterError: a pattern that matches nothing, a file that does not fit, or one of another kind than `spec.kind`.
    """
    matches: list[lycoris.Match] = []
    if spec.init_from is not None:
        rows = _file_rows(spec.init_from, transformer)
    elif spec.lycoris_config is not None:
        config = lycoris.read_config(spec.lycoris_config)
        _check_norm(spec, config.get("init_lokr_norm"))
        rows, matches = lycoris.assign(config, transformer, spec.lycoris_config)
    else:
        targets = [
            Target(layers=one.layers, factor=one.factor, rank=spec.rank, alpha=spec.alpha) for one in spec.targets or ()
        ]
        rows = resolve(linear_shapes(transformer), targets if spec.preset is None else PRESETS[spec.preset])
    for row in rows:
        kind = "lokr" if row.rank is None else "lora"
        if kind != spec.kind:
            where = spec.init_from or spec.lycoris_config
            raise AdapterError(
                f"gives {row.name} a {kind}, the recipe says {spec.kind}", where=where, hint=f"adapter.kind: {kind}"
            )
    return Plan(rows, matches)


def build(
    spec: AdapterSpec,
    transformer: nn.Module,
    layers: list[Resolved],
    *,
    dtype: torch.dtype,
    seed: int,
    device: torch.device | str | None = None,
) -> Adapter:
    """Freezes a transformer and attaches the planned adapter with its first values.

    Args:
        spec: the recipe's.
        transformer: the model.
        layers: from `plan`.
        dtype: of the adapter's parameters.
        seed: of the run.
        device: of the adapter's parameters, and of what makes them; None: where each layer is.
    """
    if spec.init_from is not None:
        return attach_file(transformer, spec.init_from, dtype=dtype, device=device)
    init = spec.init or "kaiming"
    return attach(transformer, layers, dtype=dtype, init=init, seed=seed, scale=spec.scale, device=device)


def start_norm(spec: AdapterSpec, adapter: Adapter) -> float:
    """||delta|| / ||W|| of a fresh adapter; see `init.check_start`, which refuses a perturbed start off its scale."""
    return init.check_start(adapter.layers, spec.init, spec.scale)


def _check_norm(spec: AdapterSpec, norm: float | None) -> None:
    if norm is not None and (spec.init != "perturbed" or spec.scale != norm):
        hint = f"set adapter.init: perturbed and adapter.scale: {norm:g} in the recipe, or remove it"
        raise AdapterError("init_lokr_norm differs from the recipe's start", where=spec.lycoris_config, hint=hint)


def _file_rows(path: str, transformer: nn.Module) -> list[Resolved]:
    found = linears(transformer)
    by_layer = load_adapter(path).by_layer(found)
    rows = []
    for name in (name for name in found if name in by_layer):
        size = features(found[name])
        delta = delta_from_tensors(by_layer[name], *size, f"{path}, {name}")
        lora = isinstance(delta, LoRA)
        first, second = (delta.lora_up, delta.lora_down) if isinstance(delta, LoRA) else (delta.lokr_w1, delta.lokr_w2)
        rows.append(
            Resolved(
                name=name,
                factor=None,
                in_features=size[0],
                out_features=size[1],
                w1=(first.shape[0], first.shape[1]),
                w2=(second.shape[0], second.shape[1]),
                parameters=first.numel() + second.numel(),
                pattern=path,
                rank=second.shape[0] if lora else None,
            )
        )
    return rows

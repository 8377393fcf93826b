"""Which part of a measure each linear layer has: where an adapter's parameters go."""

from __future__ import annotations

from collections.abc import Sequence

from libreflux.adapter.difference import Change
from libreflux.errors import OptionError
from libreflux.probing.layers import LayerTable

TEXT_SIDE = (".norm1_context.", ".attn.add_", ".attn.to_add_out", ".ff_context.")
"""In the names of a double block's layers that work on the text's tokens."""
_KINDS = ("transformer_blocks", "single_transformer_blocks")


def shares(measure: str, table: LayerTable, changes: Sequence[Change]) -> dict[str, float]:
    """Layer -> what it has of a measure, in a unit in which layers add up.

    "gradient": ||dL/dW||^2, what a small step of gradient descent on this layer alone lowers the loss by, up to the
    step's size. "change": ||dW||^2, its part of the whole difference. "distance" and "centred": the angular distance
    that its block turns the tokens by that it works on (a single block's: the image's), times its weights; what is in
    no block has none.

    Raises:
        OptionError: nothing has any of it.
    """
    if measure == "gradient":
        found = {name: table.gradient(name) ** 2 for name in table.gradients}
    elif measure == "change":
        return changed_shares(changes)
    else:
        found = {name: _turned(table, name, measure == "centred") for name in table.sizes}
    return _some(found, measure)


def changed_shares(changes: Sequence[Change]) -> dict[str, float]:
    """`shares` of the measure "change", which needs no table."""
    return _some({one.layer: one.change**2 for one in changes if one.kind == "weight"}, "change")


def can_have(measure: str, layer: str) -> bool:
    """Whether a layer may have anything of a measure: distances are those of blocks."""
    return measure not in ("distance", "centred") or layer.partition(".")[0] in _KINDS


def _some(found: dict[str, float], measure: str) -> dict[str, float]:
    if not any(found.values()):
        hint = "choose another measure, or compare with a model that differs"
        raise OptionError(f"no layer has any {measure}", "measure", hint=hint)
    return found


def block_of(table: LayerTable, layer: str) -> int | None:
    """The number of the block that a layer is in, in the order that they compute in; None for one in none."""
    kind, _, rest = layer.partition(".")
    if kind not in _KINDS:
        return None
    number = int(rest.partition(".")[0])
    return number if kind == _KINDS[0] else table.double + number


def _turned(table: LayerTable, layer: str, is_centred: bool) -> float:
    block = block_of(table, layer)
    if block is None:
        return 0.0
    tokens = "text" if any(part in layer for part in TEXT_SIDE) else "image"
    inner, outer = table.sizes[layer]
    return float(table.distance(tokens, is_centred=is_centred)[block]) * inner * outer

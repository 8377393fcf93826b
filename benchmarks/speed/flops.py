"""Floating-point operations that a piece of work needs, from its shapes; the share of the machine's limit is theirs."""

from __future__ import annotations

from benchmarks.speed.sizes import Size, empty_network

from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.plan import plan
from libreflux.recipe import AdapterSpec


def tokens_of(side: int) -> int:
    """Image tokens of a square picture of so many pixels a side."""
    return (side // 16) ** 2


def forward_flops(size: Size, image: int, text: int) -> tuple[float, float]:
    """(of the blocks' linears, of attention) in one forward pass of one picture; two for each multiply and add.

    Modulations see one row, not one for each token, and count for nothing beside the rest; so do the linears outside
    the blocks.
    """
    linears = 0.0
    for name, inner, outer in linear_shapes(empty_network(size)):
        if ".norm" in name or not name.startswith(("transformer_blocks", "single_transformer_blocks")):
            continue
        rows = image + text if name.startswith("single") else text if _of_text(name) else image
        linears += 2.0 * rows * inner * outer
    blocks = size.config["num_layers"] + size.config["num_single_layers"]
    return linears, 4.0 * (image + text) ** 2 * size.width * blocks


def adapter_flops(size: Size, image: int, text: int) -> float:
    """Of the LoKr's large factors in one forward pass of one picture."""
    spec = AdapterSpec.model_validate(size.adapter)
    total = 0.0
    for row in plan(spec, empty_network(size)).layers:
        if ".norm" in row.name:
            continue
        rows = image + text if row.name.startswith("single") else text if _of_text(row.name) else image
        (a, b), (c, d) = row.w1, row.w2
        total += 2.0 * rows * min(b, a) * c * d
    return total


def training_flops(size: Size, image: int, text: int) -> float:
    """Of a step with gradient checkpointing: forward, again in the backward pass, the gradient of x; the adapter's too.

    The base is frozen: its weights have no gradient. Attention's backward pass has twice its forward pass's products.
    """
    linears, attention = forward_flops(size, image, text)
    return 3 * linears + 4 * attention + 4 * adapter_flops(size, image, text)


def guided_flops(size: Size, image: int, texts: tuple[int, int]) -> float:
    """Of a step of guidance: two forward passes."""
    return sum(sum(forward_flops(size, image, text)) for text in texts)


def _of_text(name: str) -> bool:
    return any(part in name for part in (".add_", ".to_add_out", ".ff_context"))

"""What a transformer's blocks make of the image's tokens, taken beside its velocity: for a discriminator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.errors import ModelError
from libreflux.model.offload import blocks_of


@contextmanager
def image_features(transformer: FluxTransformer2DModel, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, one call of `velocity` fills a dict: number of the block -> [B, N, D], the image's tokens.

    Double blocks and single ones both return (text, image). Gradients pass through what is found as through the
    network's result, with gradient checkpointing, compiled blocks and blocks that wait in RAM as well.

    Args:
        transformer: FLUX's.
        blocks: numbers from 0, in the order that they compute in: double ones, then single ones.

    Raises:
        ModelError: the transformer has no such block.
    """
    found: dict[int, Tensor] = {}
    known = blocks_of(transformer)
    if wrong := [number for number in blocks if not 0 <= number < len(known)]:
        raise ModelError(f"there is no block {wrong[0]}", hint=f"use numbers from 0 to {len(known) - 1}")
    with ExitStack() as held:
        for number in blocks:
            # Around the block: what computes it, compiled or not, knows nothing of it. Only the first pass counts;
            # checkpointing may call the block again.
            def keep(block: nn.Module, args: Any, out: Any, number: int = number) -> None:
                found.setdefault(number, text_and_image(block, out)[1])

            held.callback(known[number].register_forward_hook(keep).remove)
        yield found


def text_and_image(block: nn.Module, pair: Any) -> tuple[Tensor, Tensor]:
    """text [B, S, D] and image [B, N, D], as blocks are given and return them; diffusers may change that."""
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        raise RuntimeError(f"diffusers' {type(block).__name__} no longer passes text and image on")
    return pair

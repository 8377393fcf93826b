"""What every block of a transformer is given and makes, text and image apart, beside one call of `velocity`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.model.features import text_and_image
from libreflux.model.offload import blocks_of

State = tuple[Tensor, Tensor]
"""text [B, S, D] and image [B, N, D]."""


@contextmanager
def hidden_states(transformer: FluxTransformer2DModel) -> Iterator[list[State]]:
    """Within the block, one call of `velocity` fills a list: what the first block is given, then what each block makes.

    State l is the input of block l, state L the output of the last one. Single blocks take text and image as one
    sequence, the double blocks' two one behind the other, so the states go on across that border.

    Args:
        transformer: FLUX's.
    """
    found: list[State] = []

    def given(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image = kwargs.get("hidden_states", args[0] if args else None)
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if not found:
            found.append(_state(block, (text, image)))

    def made(block: nn.Module, args: Any, out: Any) -> None:
        if len(found) <= len(blocks):  # gradient checkpointing calls a block again, in the backward pass
            found.append(_state(block, out))

    blocks = blocks_of(transformer)
    with ExitStack() as held:
        held.callback(blocks[0].register_forward_pre_hook(given, with_kwargs=True).remove)
        for block in blocks:
            held.callback(block.register_forward_hook(made).remove)
        yield found


def _state(block: nn.Module, pair: Any) -> State:
    text, image = text_and_image(block, pair)
    return text.detach(), image.detach()

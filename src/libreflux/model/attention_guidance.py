"""Attention that keeps away from a negative prompt: normalized attention guidance within FLUX's blocks.

The batch has every sample twice: beside its negative prompt first, beside its prompt then. Both halves have one and the
same image stream: its tokens get what `flow.guidance.nag` makes of the two attentions, in double blocks and in single
ones, and are modulated by the prompt's pooled text. Each half's text goes its own way; in single blocks, where image
and text share their modulation, it is the prompt's for both. So a picture costs two passes.

Hooks do it, around whatever computes attention and its projections: int8 weights, adapters and blocks that wait in RAM
stay as they are. A compiled block does not look at hooks, so that it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from libreflux.errors import ModelError, OptionHint
from libreflux.flow.guidance import nag
from libreflux.model.compiling import is_compiled
from libreflux.model.offload import blocks_of


@contextmanager
def normalized_attention(
    transformer: FluxTransformer2DModel, *, image_tokens: int, scale: float, tau: float, alpha: float
) -> Iterator[None]:
    """Within the block, a call of `velocity` with the batch twice is guided by attention.

    Args:
        transformer: FLUX's.
        image_tokens: N, of one picture.
        scale, tau, alpha: see `flow.guidance.nag`.

    Raises:
        ModelError: blocks that are compiled, or not FLUX's.
    """

    def guided(states: Tensor) -> Tensor:
        negative, positive = states.chunk(2)
        found = nag(positive, negative, scale, tau, alpha)
        return torch.cat([found, found])

    with ExitStack() as held:
        for block in blocks_of(transformer):
            for hook in _hooks(block, image_tokens, guided):
                held.callback(hook.remove)
        yield


def _hooks(block: nn.Module, image_tokens: int, guided: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    if is_compiled(block):
        hint = OptionHint("set `compile` off")
        raise ModelError("compiled blocks cannot be guided by attention", where=type(block).__name__, hint=hint)
    any_block: Any = block
    if isinstance(block, FluxTransformerBlock):

        def before_projection(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (guided(args[0]), *args[1:])

        yield any_block.norm1.register_forward_pre_hook(_prompts_own, with_kwargs=True)
        yield any_block.attn.to_out[0].register_forward_pre_hook(before_projection)
    elif isinstance(block, FluxSingleTransformerBlock):

        def after_attention(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            words = output.shape[1] - image_tokens
            return torch.cat([output[:, :words], guided(output[:, words:])], dim=1)

        yield any_block.norm.register_forward_pre_hook(_prompts_own, with_kwargs=True)
        yield any_block.attn.register_forward_hook(after_attention)
    else:
        raise ModelError(f"{type(block).__name__} is no block of FLUX", hint="use a FluxTransformer2DModel")


def _prompts_own(
    module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The modulation of both halves is the prompt's."""
    if not isinstance(options.get("emb"), Tensor):
        raise RuntimeError("diffusers no longer passes emb by name to a block's norm")
    own = options["emb"].chunk(2)[1]
    return args, {**options, "emb": torch.cat([own, own])}

"""A picture whose numbers overflow or are NaN is refused, with the file or the option that did it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from libreflux.adapter.layers import AdaptedLinear
from libreflux.model.finite import DAMAGED, NotFiniteError, is_finite, name_of, not_finite
from libreflux.sample.guidance import GuidedVelocity

_LARGE = 100.0
"""Weights of adapters and guidance above this are no one's intention."""


def check_latents(x: Tensor, guided: GuidedVelocity) -> None:
    """Raises NotFiniteError where latents are not finite.

    Args:
        x: latents, of any shape.
        guided: what led to them.
    """
    if not is_finite(x):
        raise _told(guided)


class OverflowingPixels(NotFiniteError):
    """A decoded picture is not finite, though its latents and the VAE's weights are."""


def check_pixels(pixels: Tensor, vae: nn.Module) -> None:
    """Raises NotFiniteError where a decoded picture is not finite, though its latents were."""
    if is_finite(pixels):
        return
    if name := not_finite(vae.state_dict()):
        raise NotFiniteError(f"{name} is not finite", where=name_of(vae) or "the VAE", hint=DAMAGED)
    raise OverflowingPixels("the picture overflows when it is decoded", hint="decode smaller latents, in fp32")


@contextlib.contextmanager
def blamed(guided: GuidedVelocity) -> Iterator[None]:
    """Says of pixels that overflow in the block what led to their latents."""
    try:
        yield
    except OverflowingPixels as error:
        raise _told(guided) from error


def _told(guided: GuidedVelocity) -> NotFiniteError:
    transformer = guided.transformer
    if name := not_finite(transformer.state_dict()):
        origin = _origin(transformer, name) or name_of(transformer) or "the transformer"
        return NotFiniteError(f"{name} is not finite", where=origin, hint=DAMAGED)
    for text in (guided.positive, guided.negative):
        if text is not None and not all(map(is_finite, [*text.tokens, text.pooled])):
            hint = "the text encoders' files are damaged, or need bf16 or fp32"
            return NotFiniteError("the encoded text is not finite", where="the text encoders", hint=hint)
    adapted = [one for one in transformer.modules() if isinstance(one, AdaptedLinear)]
    strongest = max(adapted, key=lambda one: abs(one.strength), default=None)
    weight = 0.0 if strongest is None else abs(strongest.strength)
    overflow = "the picture overflows: its numbers are not finite"
    guidance = max(guided.scale, guided.embedded_guidance or 0.0)
    if strongest is not None and weight > max(_LARGE, guidance):
        where = f"{strongest.origin or 'an adapter'} at weight {strongest.strength:g}"
        return NotFiniteError(overflow, where=where, hint="use a weight near 1")
    if guidance > _LARGE:
        return NotFiniteError(overflow, where=f"guidance {guidance:g}", hint="use a guidance near 3")
    if transformer.dtype == torch.float16:
        return NotFiniteError(overflow, where=name_of(transformer), hint="FLUX leaves the range of fp16: use bf16")
    hint = "lower the guidance and the adapters' weights; without them, the model's file is damaged"
    return NotFiniteError(overflow, where=name_of(transformer), hint=hint)


def _origin(transformer: nn.Module, name: str) -> str:
    """The adapter file that a tensor of an adapted transformer is of; "" for one of its own."""
    at, found = transformer, ""
    for part in name.split(".")[:-1]:
        if isinstance(at, AdaptedLinear):
            found = at.origin if part == "delta" else ""
        at = getattr(at, part)
    return found

"""An adapter's tensors made ready for arithmetic: what is not the transformer's or zero left out, the rest checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libreflux.adapter.layers import LoKr, LoRA, delta_norm
from libreflux.errors import AdapterError
from libreflux.model.finite import DAMAGED, NotFiniteError, not_finite
from libreflux.printing import counted, get_logger

logger = get_logger(__name__)

_TEXT = ("lora_te", "text_encoder", "te1.", "te2.", "bundle_emb.")
"""Of text encoders; OneTrainer's files carry the embeddings that were trained with them."""
_WHOLE = (".diff", ".diff_b")
"""Differences of whole weights and biases. ComfyUI saves them for layers that its LoRA does not touch: zeros."""
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


_LARGEST = 1e6
"""Of weight * ||delta||: a thousand times the norm of any layer of FLUX. Norms within the model would overflow, and
hide it: the picture is finite and of nothing."""


def check_strength(delta: LoKr | LoRA, weight: float, where: str) -> None:
    """Raises AdapterError where an adapter changes a layer beyond all numbers that a model computes with.

    Args:
        delta: the layer's.
        weight: strength of the adapter.
        where: the file and the layer.
    """
    change = abs(weight) * delta_norm(delta)
    if not change <= _LARGEST:
        what = f"at weight {weight:g} it changes the layer by {change:.2g} (Frobenius norm), which overflows"
        raise AdapterError(what, where=where, hint="use a weight near 1, or an adapter that is not damaged")


def prepared(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a transformer's adapter, in floating point.

    Tensors for text encoders are left out with a warning, differences that are zero without; fp8 is widened to bf16,
    which holds its every number.

    Args:
        tensors: as in the file.
        where: the file, for errors.

    Raises:
        AdapterError: integers, or a difference that is not zero.
        NotFiniteError: NaN or infinite numbers.
    """
    text = [name for name in tensors if name.startswith(_TEXT)]
    if text:
        logger.warning(
            "%s: only its transformer's tensors are used, not %s for text encoders", where, counted(len(text), "tensor")
        )
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(_TEXT) or (name.endswith(_WHOLE) and not tensor.float().count_nonzero()):
            continue
        if name.endswith(_WHOLE):
            hint = "merge it into a model with the program that wrote it"
            raise AdapterError(f"{name} is a whole difference, which is not read", where=where, hint=hint)
        if not tensor.is_floating_point() and not name.endswith(".alpha"):
            told = str(tensor.dtype).removeprefix("torch.")
            raise AdapterError(f"{name} is stored as {told}", where=where, hint="use the bf16, fp16 or fp8 file")
        found[name] = tensor.to(torch.bfloat16) if tensor.dtype in _FP8 else tensor
    if bad := not_finite(found):
        raise NotFiniteError(f"{bad} is not finite", where=where, hint=DAMAGED)
    return found

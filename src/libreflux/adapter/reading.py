"""An adapter's tensors made ready for arithmetic: what is not the transformer's or zero left out, the rest checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libreflux.errors import AdapterError
from libreflux.model.finite import DAMAGED, NotFiniteError, not_finite
from libreflux.printing import get_logger

logger = get_logger(__name__)

_TEXT = ("lora_te", "text_encoder", "te1.", "te2.", "bundle_emb.")
"""Of text encoders; OneTrainer's files carry the embeddings that were trained with them."""
_WHOLE = (".diff", ".diff_b")
"""Differences of whole weights and biases. ComfyUI saves them for layers that its LoRA does not touch: zeros."""
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


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
        logger.warning("%s: its %d tensors for text encoders are not used, only the transformer's", where, len(text))
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(_TEXT) or (name.endswith(_WHOLE) and not tensor.float().count_nonzero()):
            continue
        if name.endswith(_WHOLE):
            mend = "merge it into a model with the program that wrote it"
            raise AdapterError(f"{name} is a whole difference, which is not read", where=where, mend=mend)
        if not tensor.is_floating_point() and not name.endswith(".alpha"):
            told = str(tensor.dtype).removeprefix("torch.")
            raise AdapterError(f"{name} is stored as {told}", where=where, mend="use the bf16, fp16 or fp8 file")
        found[name] = tensor.to(torch.bfloat16) if tensor.dtype in _FP8 else tensor
    if bad := not_finite(found):
        raise NotFiniteError(f"{bad} is not finite", where=where, mend=DAMAGED)
    return found

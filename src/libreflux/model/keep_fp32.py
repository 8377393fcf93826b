"""What transformers and diffusers keep in fp32 for a reason, on every way of loading and casting.

T5's `wo` layers are the case: the residual stream that they feed reaches 1e6 and more, and fp16 ends at 65,504.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn


def dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a floating tensor of a model gets where the whole is cast to `dtype`.

    Args:
        model: transformers' (`_keep_in_fp32_modules` counts for fp16, `_keep_in_fp32_modules_strict` for bf16 too) or
            diffusers' (all narrower ones); any other keeps nothing.
        name: of the tensor in it.
        dtype: of the rest.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    strict = getattr(model, "_keep_in_fp32_modules_strict", None)
    kept = set(strict or ())
    if dtype == torch.float16 or strict is None:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept) else dtype


def cast(model: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """`model.to(device, dtype)`, in place, but for what stays in fp32; None leaves device or dtype."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {id(tensor): dtype_of(model, name, dtype) for name, tensor in named} if dtype is not None else {}

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=own.get(id(tensor), dtype) if tensor.is_floating_point() else None)

    model._apply(moved)


def keep_wide(model: nn.Module) -> None:
    """Widens to fp32, in place, what a model that was cast by others should have kept; what lies on meta is left."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and (wanted := dtype_of(model, name, parameter.dtype)) != parameter.dtype:
            parameter.data = parameter.data.to(wanted)

"""An encoder whose weights rest in host memory, or mapped from their file, and come to a device block by block.

The hooks are accelerate's, as in diffusers' sequential offload: a block's weights are on the device during its own
forward pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from accelerate import cpu_offload
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from libreflux.model.keep_fp32 import dtype_of

BLOCKS = ("T5Block", "CLIPEncoderLayer")
"""Classes whose weights come and go together; of other modules each has its own."""


def run_by_block(model: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Hooks a model so that it computes on `device`, whose memory holds one of its `BLOCKS` at a time, in place.

    Args:
        model: on the CPU; its weights are kept as they are, mapped or not, and seem to lie on "meta" from here on.
        device: what computes. Inputs may be elsewhere; the output goes back to where they are.
        dtype: what the floating weights are computed in, converted on the device, but for what stays in fp32
            (`kept.dtype_of`); None: as they are stored.
    """
    resting = dict(model.state_dict())
    for name, tensor in list(model.named_parameters(remove_duplicate=False)):  # tied weights by each of their names
        wide = dtype_of(model, name, dtype) if dtype is not None and tensor.is_floating_point() else None
        set_module_tensor_to_device(model, name, "meta", dtype=wide, clear_cache=False)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    cpu_offload(
        model,
        torch.device(device),
        state_dict=_Coming(resting, torch.device(device), dtypes),  # any mapping will do
        preload_module_classes=list(BLOCKS),
    )


class _Coming(Mapping[str, Tensor]):
    """Resting weights by name, each read to the device and then converted: half the way for half the bytes."""

    def __init__(self, resting: Mapping[str, Tensor], device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
        self.resting, self._device, self._dtypes = resting, device, dtypes

    def __getitem__(self, name: str) -> Tensor:
        return self.resting[name].to(self._device).to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.resting)

    def __len__(self) -> int:
        return len(self.resting)

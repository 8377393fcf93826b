"""AdamW with its moments in 8 bits, by bitsandbytes (Dettmers et al. 2021, arXiv:2110.02861): an extra, on CUDA only.

Not verified on a GPU: this file has been run only as far as its refusals.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from libreflux.errors import RunError


def require_8bit() -> None:
    """Raises RunError where 8-bit moments cannot be had: without CUDA, or without bitsandbytes."""
    where, instead = "optimizer.kind: adamw_8bit", "use adamw_bf16, which needs as little"
    if not torch.cuda.is_available():
        raise RunError("8-bit moments need a CUDA device", where=where, hint=instead)
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = f"install libreflux[bitsandbytes], or {instead}"
        raise RunError("bitsandbytes is not installed", where=where, hint=hint)


class AdamW8bit:
    """`bitsandbytes.optim.AdamW8bit` on fp32 parameters, as `training.optimizer.Optimizer`.

    Args:
        named_parameters: fp32, on CUDA.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Raises:
        RunError: see `require_8bit`; or a parameter is not fp32.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        require_8bit()
        import bitsandbytes

        self.rows = list(named_parameters)
        wrong = [name for name, parameter in self.rows if parameter.dtype != torch.float32]
        if not self.rows or wrong:
            hint = "attach the adapter with parameter_dtype(spec)"
            raise RunError("AdamW8bit needs fp32 parameters", where=wrong[0] if wrong else None, hint=hint)
        parameters = [parameter for _, parameter in self.rows]
        self.inner: Any = bitsandbytes.optim.AdamW8bit(
            parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay
        )

    def step(self, learning_rate: float, gradient: Tensor | None = None) -> None:
        """One update from a flat fp32 gradient [P], or from the parameters' own when None."""
        if gradient is not None:
            parts = gradient.split([parameter.numel() for _, parameter in self.rows])
            for (_, parameter), part in zip(self.rows, parts, strict=True):
                parameter.grad = part.view(parameter.shape)
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for _, parameter in self.rows:
            parameter.grad = None

    def state_dict_tensors(self) -> dict[str, Tensor]:
        """`<parameter>.<what bitsandbytes keeps>`: moments, their scales and code books, and the step count.

        Live, no copies. Empty before the first step that was not skipped.
        """
        return {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in self.rows
            for key, value in self.inner.state[parameter].items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict_tensors` gave; nothing at all is the state before the first step.

        Raises:
            RunError: a name that belongs to no parameter, or a parameter without state among others that have one.
        """
        if not tensors:
            self.inner.state.clear()
            return
        by_parameter: dict[str, dict[str, Any]] = {name: {} for name, _ in self.rows}
        for full, tensor in tensors.items():
            name, _, key = full.rpartition(".")
            if name not in by_parameter:
                hint = "resume with the recipe and adapter the state was saved with"
                raise RunError(f"optimizer state does not fit: {full}", hint=hint)
            by_parameter[name][key] = int(tensor) if key == "step" else tensor
        for name, parameter in self.rows:
            if not by_parameter[name]:
                raise RunError(f"optimizer state lacks {name}", hint="resume with the recipe it was saved with")
            kept = {
                key: one.to(parameter.device, copy=True) if isinstance(one, Tensor) else one
                for key, one in by_parameter[name].items()
            }
            self.inner.state[parameter] = kept

"""What torch would choose by card or version and what results depend on, pinned where libreflux computes.

On CUDA torch picks kernels and precisions by the card, by its own version and by process-wide flags. Within `pinned`:

- attention's gradients never pass through cuDNN: torch 2.5.0, and 2.11 and later, take cuDNN's attention first on
  Hopper, and its backward pass gave NaN or an illegal memory access on FLUX's shapes (H100, H200, torch 2.11; pytorch
  issue 196678). Flash, memory-efficient and math are left to choose from.
- fp32 is fp32: no TF32 in products or in the VAE's convolutions (where torch allows it by default), so that a cache
  does not depend on the card.
- bf16 products are summed in fp32, as on a CPU, not in bf16 parts.
- cuDNN chooses convolutions by rule, not by timing them.

All are flags of the process, put back afterwards. On a device that is not CUDA nothing is touched.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from libreflux.errors import RunError
from libreflux.model.switches import as_switched_now

# torch 2.9 asks for its newer names; setting those alone makes the older ones, which other libraries read, unreadable.
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # those under which cuBLAS repeats its sums


@contextmanager
def pinned(device: torch.device | str, *, drawing: bool = False) -> Iterator[None]:
    """The choices above, while the block runs.

    Args:
        device: where it computes.
        drawing: whether no gradient is taken: attention then stays as it is found, since cuDNN's forward pass is
            right and the quickest on Hopper.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    before = Flags()
    try:
        if not drawing:
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # whatever its parents say
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        yield
    finally:
        before.put_back()


class Flags:
    """What `pinned` changes, as it is found: under torch's older names, where those can be read, and its newer ones."""

    def __init__(self) -> None:
        self.cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
        self.benchmark = torch.backends.cudnn.benchmark
        self.bf16_sums = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        self.product_precision = torch.backends.cuda.matmul.fp32_precision
        self.cpu_precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        self.convolution_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        # torch refuses to read an older name whose newer one was set otherwise.
        self.older_product = _read(torch.get_float32_matmul_precision)
        self.older_convolution = _read(lambda: torch.backends.cudnn.allow_tf32)

    def put_back(self) -> None:
        """Sets all of them as they were."""
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn_attention)
        torch.backends.cudnn.benchmark = self.benchmark
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self.bf16_sums
        if self.older_product is not None:
            torch.set_float32_matmul_precision(self.older_product)
        if self.older_convolution is not None:
            torch.backends.cudnn.allow_tf32 = self.older_convolution
        torch.backends.cuda.matmul.fp32_precision = self.product_precision
        torch.backends.cudnn.conv.fp32_precision = self.convolution_precision  # type: ignore[attr-defined]
        # set_float32_matmul_precision writes the CPU's too.
        torch.backends.mkldnn.matmul.fp32_precision = self.cpu_precision  # type: ignore[attr-defined]


def _read(flag: Callable[[], Any]) -> Any:
    try:
        return flag()
    except RuntimeError:
        return None


def enable_checkpointing(transformer: FluxTransformer2DModel, kept: Iterable[nn.Module] = ()) -> None:
    """Gradient checkpointing whose second forward pass, which runs inside `backward`, is as the first one was.

    It is pinned like that, and what can be switched off in a block (an adapter) is on or off as it was then.

    Args:
        transformer: FLUX's.
        kept: blocks that keep what they compute for backward, and are not computed again.
    """
    keeping = frozenset(map(id, kept))

    def computed(block: nn.Module, *args: Any) -> Any:
        return block(*args) if id(block) in keeping else _checkpointed(block, *args)

    transformer.enable_gradient_checkpointing(computed)


def pin_checkpointing(transformer: nn.Module) -> None:
    """`enable_checkpointing` in the place of diffusers' default, where that was enabled; another function stays."""
    function = getattr(transformer, "_gradient_checkpointing_func", None)
    if getattr(transformer, "gradient_checkpointing", False) and "enable_gradient_checkpointing" in str(
        getattr(function, "__qualname__", "")
    ):
        transformer.enable_gradient_checkpointing(_checkpointed)  # type: ignore[operator]


def _checkpointed(block: nn.Module, *args: Any) -> Any:
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu"))
    as_first = as_switched_now(block)

    @contextmanager
    def again() -> Iterator[None]:
        with pinned(device), as_first():
            yield

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return pinned(device), again()

    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def deterministic(device: torch.device | str) -> Iterator[None]:
    """On CUDA the same bits from the same numbers: deterministic kernels alone, and cuBLAS's fixed workspace.

    A CPU is deterministic as it is, for one number of threads.

    Raises:
        RunError: CUDA was used before in this process without the workspace, or an operation has no such kernel.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    if os.environ.get(WORKSPACE) not in _WORKSPACES:
        if torch.cuda.is_initialized():  # cuBLAS reads it once
            hint = f"set {WORKSPACE}={_WORKSPACES[0]} in the environment before the process begins"
            raise RunError("CUDA was used in this process before", where="deterministic", hint=hint)
        os.environ[WORKSPACE] = _WORKSPACES[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with _refused_kernels():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _refused_kernels() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        said = str(error).split(". ")[0]
        raise RunError(said, where="deterministic", hint="set deterministic: false, or use device: cpu") from error

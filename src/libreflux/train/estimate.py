"""Memory and disk of a run before any weight is loaded: one step is traced without numbers.

The step runs on torch's meta device, where every operation happens and nothing is computed, and what is alive is
counted storage by storage: what an adapter, a mask, an int8 base or checkpointing keeps for backward is found, not
assumed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libreflux.adapter.files import attach
from libreflux.adapter.targets import Resolved
from libreflux.model.family import open_model
from libreflux.model.int8 import quantise_model
from libreflux.model.numerics import enable_checkpointing
from libreflux.model.text import TextConditioning
from libreflux.recipe import Recipe
from libreflux.train.loop import BASE_DTYPES, plan_layers
from libreflux.train.objective import flow_matching_loss
from libreflux.train.optimizer import BUCKET, parameter_dtype

MIB = 2**20
UPDATE_BYTES = 30  # per element of the optimizer's largest bucket: fp32 copies of parameter, moments and noise
# What a CPU process holds besides tensors; measured, see docs/log.md (the memory estimate, second time).
CPU_KERNELS = 72 * MIB  # compiled kernels and scratch that torch and oneDNN keep, the same for every model
HEAP_HOLES = 0.6  # of the activations: glibc's heap cannot give a freed aligned block to another of the same size
# bitsandbytes: numbers of a moment that share an fp32 scale; smaller parameters than the second keep fp32 moments.
BLOCK_8BIT, SMALL_8BIT = 256, 4096


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes by part; `total` is the peak on the device, without what importing torch takes.

    Attributes:
        on_cpu: whether the device is the CPU: the averages are in its memory too then.
        weights: the frozen base.
        adapter: the trained parameters.
        moments: the optimizer's two.
        gradient: the flat fp32 sum over accumulated passes.
        activations: peak of one forward and backward pass, the parameters' own gradients included.
        update: what the optimizer needs on top for a moment, after the activations are gone.
        process: on a CPU, what the process holds besides tensors. 0 elsewhere: CUDA's allocator was not measured.
        averages: fp32 averages of the adapter, on the CPU.
        checkpoint: one checkpoint on disk.
    """

    on_cpu: bool
    weights: int
    adapter: int
    moments: int
    gradient: int
    activations: int
    update: int
    averages: int
    checkpoint: int

    @property
    def process(self) -> int:
        return CPU_KERNELS + int(HEAP_HOLES * self.activations) if self.on_cpu else 0

    @property
    def total(self) -> int:
        held = self.weights + self.adapter + self.moments + self.gradient + (self.averages if self.on_cpu else 0)
        return held + max(self.activations, self.update) + self.process

    def table(self) -> str:
        """Aligned text, the peak last."""
        averages = ("averages", self.averages), ("kernels and holes in the heap", self.process)
        rows = [
            ("base weights", self.weights),
            ("adapter", self.adapter),
            ("optimizer moments", self.moments),
            ("gradient", self.gradient),
            ("activations, largest batch", self.activations),
            ("optimizer step, after them", self.update),
            *(averages if self.on_cpu else ()),
            ("CPU memory at its peak" if self.on_cpu else "device memory at its peak", self.total),
            *(() if self.on_cpu else [("averages (in CPU memory)", self.averages)]),
        ]
        return "\n".join(f"{name:<32}{size / MIB:>12,.0f} MiB" for name, size in rows)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the context create, while they are alive.

    Attributes:
        live: now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):  # what was there before is not ours to count
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def meta_transformer(config: dict[str, Any], dtype: torch.dtype) -> FluxTransformer2DModel:
    """A transformer of this configuration whose weights take no memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    nn.Module.to(transformer, dtype)  # diffusers' own `to` warns of modules to keep in fp32; FLUX has none
    return transformer.eval()


def estimate_recipe(recipe: Recipe, *, text_tokens: int) -> Estimate:
    """`estimate` of a recipe, from its model's configuration alone, for the device that it would train on here.

    Args:
        text_tokens: of the longest prompt.
    """
    path = open_model(recipe.model, parts=()).path
    assert path is not None
    config = FluxTransformer2DModel.load_config(path / "transformer")
    side = max(recipe.resolution) // 8
    transformer = meta_transformer(config, BASE_DTYPES[recipe.base])
    if recipe.base == "int8":
        quantise_model(transformer)
    if recipe.gradient_checkpointing:
        enable_checkpointing(transformer)
    return estimate(
        transformer,
        plan_layers(recipe).layers,
        adapter_dtype=parameter_dtype(recipe.optimizer),
        moments_8bit=recipe.optimizer.kind == "adamw_8bit",
        batch=recipe.batch,
        latent_size=(side, side),
        text_tokens=text_tokens,
        averages=len(recipe.ema),
        guidance=recipe.guidance,
        on_cpu=recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available()),
    )


def estimate(
    transformer: FluxTransformer2DModel,
    resolved: Sequence[Resolved],
    *,
    adapter_dtype: torch.dtype,
    batch: int,
    latent_size: tuple[int, int],
    text_tokens: int,
    averages: int = 0,
    guidance: float | None = None,
    on_cpu: bool = False,
    moments_8bit: bool = False,
) -> Estimate:
    """What training this adapter takes.

    Args:
        transformer: on the meta device, see `meta_transformer`; it is adapted in place.
        resolved: the layers to adapt.
        adapter_dtype: fp32 or bf16; the moments' too, unless they have 8 bits.
        batch: pictures per forward pass.
        latent_size: (h, w) of the largest latents.
        text_tokens: of the longest prompt.
        averages: how many fp32 averages are tracked.
        guidance: for a model with a guidance embedding.
        on_cpu: whether it trains on the CPU.
        moments_8bit: whether the optimizer is `train.optimizer8.AdamW8bit`.
    """
    weights = _bytes([*transformer.parameters(), *transformer.buffers()])
    adapter = attach(transformer, resolved, dtype=adapter_dtype, init="ones")
    parameters = list(adapter.parameters())
    count, own = sum(parameter.numel() for parameter in parameters), _bytes(parameters)
    moments = sum(map(_moments_8bit, parameters)) if moments_8bit else 2 * own
    return Estimate(
        on_cpu=on_cpu,
        weights=weights,
        adapter=own,
        moments=moments,
        gradient=4 * count,
        activations=trace_pass(transformer, batch, latent_size, text_tokens, guidance),
        update=UPDATE_BYTES * min(count, max(BUCKET, *(parameter.numel() for parameter in parameters))),
        averages=averages * 4 * count,
        checkpoint=own + moments + averages * 4 * count,
    )


def _moments_8bit(parameter: Tensor) -> int:
    count = parameter.numel()
    return 2 * (4 * count if count < SMALL_8BIT else count + 4 * -(-count // BLOCK_8BIT))


def trace_pass(
    transformer: FluxTransformer2DModel,
    batch: int,
    latent_size: tuple[int, int],
    text_tokens: int,
    guidance: float | None = None,
) -> int:
    """Peak bytes that one forward and backward pass of an adapted meta transformer has alive at a time."""
    config = transformer.config
    latents = torch.empty(batch, config.in_channels // 4, *latent_size, device="meta")
    dtype = next(parameter.dtype for name, parameter in transformer.named_parameters() if "norm_q" in name)
    text = TextConditioning(
        [torch.empty(text_tokens, config.joint_attention_dim, device="meta", dtype=dtype) for _ in range(batch)],
        torch.empty(batch, config.pooled_projection_dim, device="meta", dtype=dtype),
    )
    sigma = torch.empty(batch, device="meta")
    with _attention_in_tiles(), LiveBytes() as live:
        losses = flow_matching_loss(transformer, latents, torch.empty_like(latents), sigma, text, guidance=guidance)
        losses.sum().backward()
    for parameter in transformer.parameters():
        parameter.grad = None
    return live.peak


@contextmanager
def _attention_in_tiles() -> Iterator[None]:
    """Attention that keeps its inputs, its output and a logarithm per row, as fused kernels do on CPU and CUDA."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        out: Tensor = _TiledAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return out

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""Memory and disk of a run before any weight is loaded: each phase is traced without numbers, see `training.trace`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.layers import AdaptedLinear
from libreflux.adapter.targets import Resolved
from libreflux.data import precision
from libreflux.data.cache import index_folders
from libreflux.data.crops import View, aspect_buckets, views
from libreflux.data.encode import SHARD_ITEMS
from libreflux.data.precision import DTYPES
from libreflux.model.compiling import kinds_of
from libreflux.model.int8 import quantise_model
from libreflux.model.numerics import enable_checkpointing
from libreflux.model.offload import blocks_of, frozen_sizes
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.model.w8a8 import quantise_activations
from libreflux.recipe import AdversarialSpec, Recipe
from libreflux.training import flow_objective, trace, training_adapter
from libreflux.training.adversary import Adversary, spec_of
from libreflux.training.bf16_update import CHUNK, CHUNK_ON_A_CARD, SCRATCH_BYTES
from libreflux.training.flow_objective import FlowKeys, Roles
from libreflux.training.memory import on_cpu
from libreflux.training.objective import NoisedBatch
from libreflux.training.optimizer import BUCKET, parameter_dtype
from libreflux.training.phases import Estimate, Phase, libraries
from libreflux.training.planned import BASE_DTYPES, INT8_BASES, plan_layers
from libreflux.training.training_adapter import TrainingAdapter

UPDATE_BYTES = 30  # of fp32 AdamW, per element of its largest bucket
# bitsandbytes: numbers of a moment that share an fp32 scale; smaller parameters than the second keep fp32 moments.
BLOCK_8BIT, SMALL_8BIT = 256, 4096


def estimate_recipe(
    recipe: Recipe, source: ModelSource | None = None, *, text_tokens: int, captions: int | None = None
) -> Estimate:
    """`estimate` of a recipe, with all its phases, for the device that it would train on here.

    Args:
        recipe: its model's configuration files are read.
        source: the model, where that is open; None: it is opened by its name.
        text_tokens: of the longest prompt.
        captions: how many there are; None: more than are encoded at a time.

    What is `auto` is decided by `memory_plan.fitted`: here no block waits, and each is computed again in backward.

    Raises:
        LibrefluxError: a fault of the model or the targets, see `planned.plan_layers`.
    """
    opened, cpu = open_model(recipe.model if source is None else source), on_cpu(recipe)
    transformer = _transformer(opened, recipe)
    encoding = _Encoding.of(opened, recipe, cpu)
    shown = views(recipe.crop, recipe.resolution)
    adversarial, keys = spec_of(recipe), flow_objective.flow_keys(recipe)
    found = estimate(
        transformer,
        plan_layers(recipe, opened).layers,
        adapter_dtype=parameter_dtype(recipe.optimizer),
        moments_8bit=recipe.optimizer.kind == "adamw_8bit",
        batch=recipe.batch,
        latent_size=_latent_size(largest_crop(shown)),
        text_tokens=text_tokens,
        averages=len(recipe.ema),
        guidance=recipe.guidance,
        on_cpu=cpu,
        adversarial=adversarial,
        beside=training_adapter.read(recipe),
        flow_keys=keys,
    )
    at_once = min(SHARD_ITEMS, captions or SHARD_ITEMS)
    if recipe.text_cache == "none":
        at_once = min(SHARD_ITEMS, 1 + len(recipe.samples.prompts))  # captions are encoded batch by batch in training
        if encoding is not None:
            activations = max(found.activations, encoding.activations(recipe.batch, text_tokens))
            found = dataclasses.replace(found, encoders=encoding.weights, activations=activations)
    drawing = _drawing(opened, recipe, transformer, found, text_tokens)
    measuring = _measuring(recipe, transformer, found, text_tokens)
    preparing = [_encoding_pictures(opened, recipe, cpu)]
    if encoding is not None:
        preparing.append(_encoding_captions(encoding, at_once, text_tokens, cpu))
    found = dataclasses.replace(found, preparing=tuple(preparing), between=(*drawing, *measuring))
    if recipe.gradient_checkpointing == "auto":
        transformer.disable_gradient_checkpointing()
        size = _latent_size(largest_crop(shown))
        adversary = None if adversarial is None else Adversary(adversarial, transformer, 0, "meta")
        learn = _learning(transformer, adversary, keys)
        unchecked = trace.trace_pass(transformer, recipe.batch, size, text_tokens, recipe.guidance, learn=learn)
        if encoding is not None and recipe.text_cache == "none":
            unchecked = max(unchecked, found.activations)
        found = dataclasses.replace(found, unchecked=unchecked)
    return found if cpu or recipe.offload_blocks == "auto" else found.offloaded(recipe.offload_blocks)


def largest_crop(shown: Sequence[View]) -> tuple[int, int]:
    """(width, height) in pixels of the largest crop that these views can give, whatever the pictures' shapes."""
    sizes = [(view.resolution, view.resolution) for view in shown]
    for view in shown:
        if view.crop == "aspect":
            sizes += aspect_buckets(view.resolution, view.step)
    return max(sizes, key=lambda size: size[0] * size[1])


def _latent_size(size: tuple[int, int]) -> tuple[int, int]:
    return size[1] // 8, size[0] // 8


def _transformer(opened: ModelSource, recipe: Recipe) -> FluxTransformer2DModel:
    transformer = trace.meta_transformer(opened.part_config("transformer"), BASE_DTYPES[recipe.base])
    if recipe.base in INT8_BASES:
        quantise_model(transformer)
    if recipe.base == "w8a8":
        quantise_activations(transformer, "int8")
    if recipe.gradient_checkpointing:
        enable_checkpointing(transformer)
    return transformer


@dataclass(frozen=True)
class _Encoding:
    """Both text encoders on the meta device; `weights` are the bytes of them that the device holds at a time."""

    clip: Any
    t5: Any
    dtype: torch.dtype
    weights: int

    @staticmethod
    def of(opened: ModelSource, recipe: Recipe, cpu: bool) -> _Encoding | None:
        """None for a model without encoders, which trains on what is in its cache."""
        if not all(opened.has(part) for part in ("text_encoder", "text_encoder_2")):
            return None
        place = "cpu" if cpu else "cuda"
        dtype = DTYPES[precision.resolve(recipe.text_precision, place, index_folders(recipe.cache_dir))]
        configs = [opened.part_config(f"text_encoder{end}") for end in ("", "_2")]
        clip, t5 = trace.meta_encoders(configs[0], configs[1], dtype)
        weights = trace.weights_of(clip) + trace.weights_of(t5)
        if dtype == torch.float32 and not cpu:  # T5 goes through a card block by block then
            blocks = [trace.weights_of(block) for block in t5.encoder.block]
            weights -= sum(blocks) - max(blocks)
        return _Encoding(clip, t5, dtype, weights)

    def activations(self, captions: int, tokens: int) -> int:
        return trace.trace_text(self.clip, self.t5, captions, tokens)


def _encoding_pictures(opened: ModelSource, recipe: Recipe, cpu: bool) -> Phase:
    """One crop at a time."""
    vae, size = trace.meta_vae(opened.part_config("vae")), largest_crop(views(recipe.crop, recipe.resolution))
    activations = trace.trace_encode(vae, size, sample=recipe.latents == "sample")
    return Phase(
        name="preparing pictures, VAE in fp32",
        held=trace.weights_of(vae),
        activations=activations,
        libraries=libraries(cpu, activations),
    )


def _encoding_captions(encoding: _Encoding, captions: int, tokens: int, cpu: bool) -> Phase:
    activations = encoding.activations(captions, tokens)
    return Phase(
        name=f"preparing captions, T5 and CLIP in {'fp32' if encoding.dtype == torch.float32 else 'bf16'}",
        held=encoding.weights,
        activations=activations,
        libraries=libraries(cpu, activations),
    )


def _drawing(
    opened: ModelSource, recipe: Recipe, transformer: FluxTransformer2DModel, found: Estimate, tokens: int
) -> Iterator[Phase]:
    """Sample pictures come one at a time, and the two passes of a guided step one after the other."""
    samples = recipe.samples
    if not samples.prompts or not (samples.every or samples.at_start):
        return
    vae, side = trace.meta_vae(opened.part_config("vae")), max(recipe.resolution)
    drawn = trace.trace_pass(transformer, 1, (side // 8, side // 8), tokens, recipe.guidance, backward=False)
    activations = max(drawn, trace.trace_decode(vae, side))
    yield Phase(
        name="drawing samples",
        held=found.held + trace.weights_of(vae),
        activations=activations,
        libraries=libraries(found.on_cpu, activations),
    )


def _measuring(recipe: Recipe, transformer: FluxTransformer2DModel, found: Estimate, tokens: int) -> Iterator[Phase]:
    """Held-out pictures are measured in batches, in the first view of the recipe."""
    if not recipe.held_out.chosen or not recipe.held_out.every:
        return
    size = _latent_size(largest_crop(views(recipe.crop, recipe.resolution)[:1]))
    activations = trace.trace_pass(transformer, recipe.batch, size, tokens, recipe.guidance, backward=False)
    yield Phase(
        name="measuring held-out pictures",
        held=found.held,
        activations=activations,
        libraries=libraries(found.on_cpu, activations),
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
    adversarial: AdversarialSpec | None = None,
    beside: TrainingAdapter | None = None,
    flow_keys: FlowKeys | None = None,
) -> Estimate:
    """What training this adapter takes.

    Args:
        transformer: on the meta device, see `trace.meta_transformer`; it is adapted in place.
        resolved: the layers to adapt.
        adapter_dtype: fp32 or bf16; the moments' too, unless they have 8 bits.
        batch: pictures per forward pass.
        latent_size: (h, w) of the largest latents.
        text_tokens: of the longest prompt.
        averages: how many fp32 averages are tracked.
        guidance: for a model with a guidance embedding.
        on_cpu: whether it trains on the CPU.
        moments_8bit: whether the optimizer is `training.optimizer8.AdamW8bit`.
        adversarial: of a student that learns from an adversary.
        beside: the training adapter.
        flow_keys: of a recipe that has passes for them.
    """
    weights = trace.weights_of(transformer)
    adapter = attach(transformer, resolved, dtype=adapter_dtype, init="ones")
    parameters = list(adapter.parameters())
    count, own = sum(parameter.numel() for parameter in parameters), trace.size_in_bytes(parameters)
    moments = sum(map(_moments_8bit, parameters)) if moments_8bit else 2 * own
    on = None if beside is None else beside.put_on(transformer, adapter, "meta")
    adversary = None if adversarial is None else Adversary(adversarial, transformer, 0, "meta")
    learn = _learning(transformer, adversary, flow_keys)
    heads = [] if adversary is None else adversary.parameters
    of_heads = trace.size_in_bytes(heads)
    return Estimate(
        on_cpu=on_cpu,
        weights=weights,
        adapter=own,
        training_adapter=0 if on is None else trace.size_in_bytes(on.parameters()),
        moments=moments,
        gradient=4 * count,
        heads=4 * of_heads,  # weights, two moments, gradient
        activations=trace.trace_pass(transformer, batch, latent_size, text_tokens, guidance, learn=learn),
        update=max(_update(some, on_cpu) for some in (parameters, heads) if some),
        averages=averages * 4 * count,
        checkpoint=own + moments + averages * 4 * count + 3 * of_heads,
        blocks=tuple(map(frozen_sizes, blocks_of(transformer))),
        kinds=kinds_of(transformer),
    )


def _learning(
    transformer: FluxTransformer2DModel, adversary: Adversary | None, keys: FlowKeys | None
) -> Callable[[NoisedBatch], object] | None:
    """A pass of the adapter that is on a transformer, with an adversary or under keys; None: plain flow matching."""
    layers = {name: each for name, each in transformer.named_modules() if isinstance(each, AdaptedLinear)}
    adapter = Adapter(transformer, layers)
    from_file = {name: each for name, each in layers.items() if each.origin}  # the training adapter
    beside = Adapter(transformer, from_file) if from_file else None
    if adversary is not None:
        return lambda noised: adversary.learn(transformer, adapter, noised, noised, torch.ones_like(noised.sigma))
    if keys is None:
        return None

    def learn(noised: NoisedBatch) -> object:
        """Every picture is guided and held, and the empty prompt as long as the others."""
        count, weights, empty = len(noised), torch.ones_like(noised.sigma), noised.text.index([0])
        roles = Roles([False] * count, [keys.guided is not None] * count, [keys.hold is not None] * count)
        how = {"keys": keys, "roles": roles, "empty": empty, "beside": beside}
        return flow_objective.learn(transformer, adapter, noised, weights, **how)

    return learn


def _update(parameters: Sequence[Tensor], on_cpu: bool) -> int:
    largest, count = max(one.numel() for one in parameters), sum(one.numel() for one in parameters)
    if parameters[0].dtype == torch.bfloat16:
        return SCRATCH_BYTES * min(largest, CHUNK if on_cpu else CHUNK_ON_A_CARD)
    return UPDATE_BYTES * min(count, max(BUCKET, largest))


def _moments_8bit(parameter: Tensor) -> int:
    count = parameter.numel()
    return 2 * (4 * count if count < SMALL_8BIT else count + 4 * -(-count // BLOCK_8BIT))

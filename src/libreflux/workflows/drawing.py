"""What `generate`, `remake` and `grid` share: a model, perhaps with adapters, opened for drawing.

Text encoders and transformer are never needed at once: `open_for_drawing` looks at the model, `AdaptedSource.load`
encodes all texts, lets the encoders go and loads the transformer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from libreflux.adapter.io import AdapterFile, attach_file
from libreflux.errors import OptionHint
from libreflux.files import sha256_file
from libreflux.flow.solve import Step
from libreflux.model import compile_choice
from libreflux.model.compile_choice import Compile
from libreflux.model.compiling import CompiledBlocks, missing_compiler, work_of
from libreflux.model.device import release
from libreflux.model.device_faults import explained
from libreflux.model.facts import Facts
from libreflux.model.int8 import int8_layers
from libreflux.model.offload import block_names, check_count, waiting_names
from libreflux.model.opening import open_model
from libreflux.model.single_file import SingleFiles
from libreflux.model.source import ModelSource
from libreflux.model.text import TextConditioning, TextEncoders, check_padding
from libreflux.model.w8a8 import kind_for, quantise_activations
from libreflux.printing import counted
from libreflux.sample.checks import first_steps_argument
from libreflux.sample.encoding import Encoded, Text, encode_ahead, encode_in_turn, untold
from libreflux.sample.first_steps import FirstSteps
from libreflux.sample.metadata import GenerationRecord, versions
from libreflux.sample.pipeline import LibreFluxPipeline
from libreflux.sample.rules import nag_of, rule_of
from libreflux.values import adapter_argument, is_guided
from libreflux.workflows.adapters import adapted_facts, as_typed, check_base, load_arguments
from libreflux.workflows.drawing_device import WAITING, device_for, refuse_int8
from libreflux.workflows.first_model import check_beside_first, check_latents_agree, first_record
from libreflux.workflows.picture_options import Offload, OffloadBlocks, Quantize

SMALLER = OptionHint(
    "a smaller `width` and `height`, `quantize` int8, `offload` model, `offload_blocks` auto or `offload` sequential "
    "(on CUDA), or `device` cpu"
)
FEWER_ENCODERS = OptionHint("`offload` sequential (on CUDA), or `device` cpu")


@dataclass(frozen=True)
class DrawingSession:
    """A pipeline and what a picture's record says of it.

    Attributes:
        pipe: draws from what is in `texts`.
        texts: all that may be drawn, encoded.
        facts: the model's, under its adapters.
        device: what computes.
        dtype: of the transformer's weights, see `GenerationRecord`.
        hashes: "transformer" to its SHA-256.
        adapters: file name, SHA-256, weight and path as it was named of each adapter, in order.
        compiled: the transformer's blocks; None where they are not.
        on_notice: told of what was compiled.
        first: the model that draws the first steps, with the texts as it reads them; None is no other.
    """

    pipe: LibreFluxPipeline
    texts: dict[Text, TextConditioning]
    facts: Facts
    device: torch.device
    dtype: str
    hashes: dict[str, str]
    adapters: list[dict[str, Any]] = field(default_factory=list)
    compiled: CompiledBlocks | None = None
    on_notice: Callable[[str], None] | None = None
    first: DrawingSession | None = None

    def stamped(self, record: GenerationRecord) -> GenerationRecord:
        """The same picture, made with this model on this machine."""
        first = {} if self.first is None else {"first_transformer": self.first.hashes["transformer"]}
        return dataclasses.replace(
            record,
            dtype=self.dtype,
            device=_device_name(self.device),
            hashes=self.hashes | first,
            adapters=self.adapters,
            compile=self.compiled is not None,
            versions=versions(),
        )

    def draw(self, record: GenerationRecord, on_step: Callable[[Step], None] | None = None) -> Image.Image:
        """The picture that a record tells of; alone, since its last bits depend on who shares its batch."""
        (image,) = self.draw_together([record], on_step)
        return image

    def draw_together(
        self, records: Sequence[GenerationRecord], on_step: Callable[[Step], None] | None = None
    ) -> list[Image.Image]:
        """The pictures of records that differ in prompt and seed alone, as one batch."""
        record = records[0]
        positive, negative = self._texts(records)
        with explained(f"drawing {_size(records)} pixels on {self.device}", SMALLER):
            images = self.pipe(
                prompt_conditioning=positive,
                negative_conditioning=negative,
                height=record.height,
                width=record.width,
                num_inference_steps=record.steps,
                sigmas=record.sigmas,
                guidance_scale=record.scale,
                no_cfg_until=record.no_cfg_until,
                guidance_start=record.guidance_start,
                guidance_stop=record.guidance_stop,
                guidance_rescale=record.guidance_rescale,
                guidance_rule=rule_of(record),
                nag=nag_of(record),
                first_steps=None if self.first is None else self.first.first_steps(records),
                batch_cfg=record.batch_cfg,
                embedded_guidance=record.embedded_guidance,
                tile=record.tile,
                seeds=[one.seed for one in records],
                callback_on_step=on_step,
            ).images
        assert isinstance(images, list)
        if self.compiled is not None and self.on_notice is not None and (line := self.compiled.news()):
            self.on_notice(line)
        return images

    def first_steps(self, records: Sequence[GenerationRecord]) -> FirstSteps | None:
        """The first steps of these pictures by this model; None where they are not its."""
        if (told := records[0].first_steps_from) is None:
            return None
        begun = [first_record(record) for record in records]
        positive, negative = self._texts(begun)
        return FirstSteps(
            transformer=self.pipe.transformer,
            steps=first_steps_argument(told)[1],
            positive=positive,
            negative=negative,
            scale=begun[0].scale,
            embedded_guidance=self.facts.embedded_guidance,
        )

    def _texts(self, records: Sequence[GenerationRecord]) -> tuple[TextConditioning, TextConditioning | None]:
        texts = [[self.texts[text] for text in texts_of(one)] for one in records]
        negatives = [negative for _, *rest in texts for negative in rest]  # all have the same
        return _together([positive for positive, *_ in texts]), _together(negatives[:1]) if negatives else None


@dataclass(frozen=True)
class AdaptedSource:
    """A model that passed all checks, of which the VAE alone is in memory.

    Attributes:
        source: the model, with its facts as they are under the adapters.
        vae: loaded.
        device: what computes.
        files: the adapters with their weights.
        named: their paths, as the user named them.
        offload, quantize, offload_blocks, compile: see `picture_options`.
        on_notice: told whether blocks are compiled, and of what was.
        first: the model that draws the first steps; None is no other.
    """

    source: ModelSource
    vae: AutoencoderKL
    device: torch.device
    files: Sequence[tuple[AdapterFile, float]]
    named: Sequence[str]
    offload: Offload = "auto"
    quantize: Quantize | None = None
    offload_blocks: OffloadBlocks = 0
    compile: Compile = "auto"
    on_notice: Callable[[str], None] | None = None
    first: AdaptedSource | None = None

    @property
    def facts(self) -> Facts:
        """The model's, under its adapters."""
        return self.source.facts

    @property
    def size(self) -> int:
        """Pixels per side of a picture by default."""
        return LibreFluxPipeline.size_of(self.vae)

    def load(
        self,
        records: Iterable[GenerationRecord],
        sha256: Callable[[Path], str] = sha256_file,
        told: Encoded = untold,
        passes: int | None = None,
    ) -> DrawingSession:
        """Ready to draw these pictures, and whatever else has their texts; `sha256` see `ModelSource.hash_with`.

        `told` is told of texts that are encoded; `passes` of the transformer in all, where these pictures are a part.
        """
        records = list(records)
        release(self.device)  # what was drawn with before
        first = None if self.first is None else self.first.load([first_record(one) for one in records], sha256)
        with explained(f"encoding the prompts on {self.device}", FEWER_ENCODERS):
            texts, encoders = self.encoded([text for record in records for text in texts_of(record)], told)
        with explained(f"reading the model onto {self.device}", SMALLER):
            session = self._opened(records, texts, encoders, sha256)
        compiled = self._compiled(session.pipe.transformer, records, passes)
        return dataclasses.replace(session, compiled=compiled, first=first)

    def _compiled(
        self, transformer: FluxTransformer2DModel, records: Sequence[GenerationRecord], passes: int | None = None
    ) -> CompiledBlocks | None:
        kind = self.device.type
        if self.compile == "auto" and any(record.nag for record in records):
            return None
        if self.compile == "off" or (self.compile == "auto" and (kind != "cuda" or self.offload == "sequential")):
            return None
        if passes is None:
            passes = sum(record.passes for record in records) // max((record.batch for record in records), default=1)
        work = work_of(transformer, passes, training=False)
        choice = compile_choice.choose(self.compile, kind, work, missing=missing_compiler(self.device))
        if not choice.on:
            return None
        if choice.told is not None and self.on_notice is not None:
            self.on_notice(choice.told)
        return CompiledBlocks(transformer)

    def _opened(
        self,
        records: Sequence[GenerationRecord],
        texts: dict[Text, TextConditioning],
        encoders: TextEncoders | None,
        sha256: Callable[[Path], str],
    ) -> DrawingSession:
        chosen = 0 if self.offload_blocks == "auto" else self.offload_blocks  # how many is known with the weights
        on_cpu = self.offload in WAITING or self.offload_blocks == "auto"
        place = torch.device("cpu") if on_cpu else self.device
        names = waiting_names(self.source.config, chosen)
        quantise = True if self.quantize else None
        transformer = self.source.load_transformer(quantise=quantise, device=place, waiting=names)
        dtype = str(transformer.dtype).removeprefix("torch.")
        if int8_layers(transformer):
            refuse_int8(self.offload)
            kind = "int8"
            if self.quantize == "w8a8":
                quantise_activations(transformer, activations := kind_for(self.device))
                kind = f"w8a8 ({activations})"
            dtype = f"{kind}, {dtype}"
        transformer_hash = self.source.hash_with(sha256)
        check_base(self.source, transformer_hash, self.files)
        for file, weight in self.files:
            attach_file(transformer, file, weight, dtype=transformer.dtype)
        if self.offload_blocks != 0:
            from libreflux.workflows.drawing_blocks import let_wait  # what estimates a run takes a second to import

            tokens = max(max(text.lengths) for text in texts.values())
            let_wait(transformer, self.offload_blocks, self.vae, records, tokens, self.device)
        pipe = LibreFluxPipeline.from_parts(transformer, self.vae, encoders, self.facts, self.source.scheduler)
        pipe.set_progress_bar_config(disable=True)
        if self.offload == "model":
            pipe.enable_model_cpu_offload(device=self.device)
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=self.device)
        rows: list[dict[str, Any]] = [
            {"file": Path(file.where).name, "sha256": file.sha256, "weight": weight, "path": as_typed(named)}
            for (file, weight), named in zip(self.files, self.named, strict=True)
        ]
        hashes = {"transformer": transformer_hash}
        return DrawingSession(pipe, texts, self.facts, self.device, dtype, hashes, rows, on_notice=self.on_notice)

    def encoded(
        self, texts: Sequence[Text], told: Encoded = untold
    ) -> tuple[dict[Text, TextConditioning], TextEncoders | None]:
        """The texts, and the encoders if they are to stay; else nothing of them is left in memory."""
        in_turn, by_block = self.offload == "model", self.offload == "sequential"
        encoders = self.source.load_text(device=torch.device("cpu") if in_turn else self.device, by_block=by_block)
        if in_turn:
            found = encode_in_turn(encoders, self.facts, texts, self.device, told)
        else:
            found = encode_ahead(encoders, self.facts, texts, told)
        if self.offload == "none":
            return found, encoders
        del encoders
        release(self.device)
        return found, None


def open_for_drawing(
    model: str | SingleFiles | ModelSource,
    adapters: Iterable[str] = (),
    device: str = "auto",
    offload: Offload = "auto",
    quantize: Quantize | None = None,
    offload_blocks: OffloadBlocks = 0,
    compile: Compile = "auto",
    on_notice: Callable[[str], None] | None = None,
    first: str | ModelSource | None = None,
    *,
    training_adapters: bool = False,
) -> AdaptedSource:
    """Choose a model with adapter arguments (`PATH[:WEIGHT]`); what can be refused is, before large weights are loaded.

    `first` is the model that draws the first steps; adapters are not put on it, and its blocks are not compiled.

    Raises:
        OptionError: an offload that the device has no use for, or more waiting blocks than the model has.
        ModelError, AdapterError, RunError: see `open_model`, `load_arguments` (`training_adapters`) and `pick_device`.
    """
    place, adapters = device_for(device, offload, quantize, offload_blocks, compile), list(adapters)
    files = load_arguments(adapters, training_adapters=training_adapters)
    named = [adapter_argument(text)[0] for text in adapters]
    source = open_model(model)
    if offload_blocks != "auto":
        check_count(offload_blocks, len(block_names(source.config)))
    source = source.with_facts(adapted_facts(source.facts, files))
    check_padding(source.facts.text_padding)
    vae = source.load_vae(device="cpu" if offload in WAITING else place)
    opened = AdaptedSource(source, vae, place, files, named, offload, quantize, offload_blocks, compile, on_notice)
    if first is None:
        return opened
    check_beside_first(offload, offload_blocks)
    other = open_for_drawing(first, (), device, offload, quantize, compile="off")
    check_latents_agree(opened.source, opened.vae, other.source, other.vae)
    return dataclasses.replace(opened, first=other)


def texts_of(record: GenerationRecord) -> list[Text]:
    """What must be encoded for a picture: its prompt, and where it is guided its negative prompt."""
    texts = [(record.prompt, record.prompt_2), (record.negative, record.negative_2)]
    return [Text(*both, record.max_tokens) for both in texts[: 1 + (is_guided(record.scale) or record.nag > 0)]]


def _together(texts: Sequence[TextConditioning]) -> TextConditioning:
    return texts[0] if len(texts) == 1 else TextConditioning.cat(texts)


def _size(records: Sequence[GenerationRecord]) -> str:
    several = f"{len(records)} x " if len(records) > 1 else ""
    return f"{several}{records[0].width} x {records[0].height}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {counted(threads, 'thread')}" if device.type == "cpu" else device.type

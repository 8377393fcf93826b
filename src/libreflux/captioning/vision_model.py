"""A local vision-language model of transformers: checked, loaded, asked. Not verified with real weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from libreflux import seeding
from libreflux.captioning.answers import Answer
from libreflux.captioning.asking import OpenPicture, Question, Take, Wording
from libreflux.errors import DataError, ModelError
from libreflux.model.device import pick_dtype
from libreflux.model.device_faults import explained
from libreflux.model.int8 import quantise
from libreflux.model.load import one_line, quiet
from libreflux.model.parts import check_part

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be asked.

    Attributes:
        model: on its device, frozen.
        processor: pads on the left, so that all answers of a batch begin at one place.
    """

    model: Any
    processor: Any


def load_vision_model(folder: Path, dtype: str, quantize: Literal["int8"] | None, device: torch.device) -> Loaded:
    """Loads a model and its processor; no code of theirs is run, and nobody is asked for more.

    Args:
        folder: config.json, safetensors, a processor with a chat template, a tokenizer.
        dtype: "stored", "bf16" or "fp32".
        quantize: "int8": the linears of its language model, layer by layer; the rest stays as it is.
        device: where it computes.

    Raises:
        ModelError: not such a model, a pickle, weights that are missing, or no chat template.
    """
    check_part(folder)
    ours: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    wanted = None if dtype == "stored" else pick_dtype(dtype)
    with one_line(folder), quiet():
        processor = _processor(folder, ours)
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder, use_safetensors=True, dtype=wanted or "auto", output_loading_info=True, **ours
        )
    if missing := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        told = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
        raise ModelError(f"missing keys: {told}", where=folder, hint="the weights and config.json differ")
    model.requires_grad_(False).eval()
    if quantize is not None:
        quantise_language_model(model, folder)
    with explained(f"captioning on {device}", "a smaller model, `quantize` int8, or `dtype` bf16"):
        return Loaded(model.to(device), processor)


def quantise_language_model(model: nn.Module, where: object) -> list[str]:
    """Puts int8 linears in the place of those of the language model, which has most of the weights.

    Its head and the vision part stay: some vision parts compute in the dtype of their linears' weights.

    Returns:
        Names of the layers.

    Raises:
        ModelError: a model without a language model that is known as such, or one without linears in it.
    """
    base = getattr(model, "model", model)
    language = getattr(base, "language_model", None)
    linears = [] if language is None else [(n, m) for n, m in language.named_modules() if type(m) is nn.Linear]
    if language is None or not linears:
        hint = "leave `quantize` out, or serve the model and name its `endpoint`"
        raise ModelError(
            f"{type(model).__name__} has no language model whose linears are known", where=where, hint=hint
        )
    for name, linear in linears:
        path, _, child = name.rpartition(".")
        setattr(language.get_submodule(path), child, quantise(linear, name))
    return [name for name, _ in linears]


class _PictureRefused(Exception):
    """The processor does not take a picture of a batch."""


class VisionModel:
    """Asks a local model, several questions at once.

    Args:
        loaded: the model.
        wording: how answers are written.
        open_picture: gives the pictures.
        together: questions of one pass.
    """

    def __init__(self, loaded: Loaded, wording: Wording, open_picture: OpenPicture, together: int) -> None:
        self._model, self._processor = loaded.model, loaded.processor
        self._wording, self._open, self._together = wording, open_picture, together

    def answers(self, take: Take) -> Iterator[tuple[Question, Answer]]:
        """See `asking.Asker`."""
        while batch := self._next(take):
            read: list[tuple[Question, Image.Image]] = []
            for question in batch:
                try:
                    read.append((question, self._open(question.file)))
                except DataError as error:
                    yield question, Answer(error.what, fault="unreadable")
            if read:
                questions, pictures = zip(*read, strict=True)
                yield from zip(questions, self._ask_each(questions, pictures), strict=True)

    def _next(self, take: Take) -> list[Question]:
        found: list[Question] = []
        while len(found) < self._together and (question := take()) is not None:
            found.append(question)
        return found

    def _ask_each(self, questions: Sequence[Question], pictures: Sequence[Image.Image]) -> list[Answer]:
        """Answers of a batch; one picture that the processor refuses does not stop the others."""
        try:
            return self._ask(questions, pictures)
        except _PictureRefused as error:
            if len(questions) == 1:
                return [Answer(f"the model's processor refuses it ({error})", fault="unreadable")]
        pairs = zip(questions, pictures, strict=True)
        return [answer for question, picture in pairs for answer in self._ask_each([question], [picture])]

    @torch.inference_mode()
    def _ask(self, questions: Sequence[Question], pictures: Sequence[Image.Image]) -> list[Answer]:
        device = self._model.device
        limit = self._wording.max_tokens
        doing = f"captioning on {device}, {len(questions)} at once"
        with explained(doing, "a smaller `batch`, `side` or model"), quiet():
            inputs = _inputs(self._processor, [question.prompt for question in questions], pictures)
            inputs = inputs.to(device, dtype=self._model.dtype)
            draws = Draws([(self._wording.temperature_of(one), self._wording.seed_of(one)) for one in questions])
            made = self._model.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([draws]),
                pad_token_id=self._processor.tokenizer.pad_token_id,
            )
        own = made if self._model.config.is_encoder_decoder else made[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(own, skip_special_tokens=True)
        ends = _end_tokens(self._model)
        cut = [len(row) >= limit and not ends.intersection(row) for row in own.tolist()]
        return [Answer(text, cut=over) for text, over in zip(texts, cut, strict=True)]


class Draws(LogitsProcessor):
    """Makes the likeliest token of a row a draw from its distribution, with numbers of the row's own.

    argmax(logits / T + g), where g is Gumbel noise, is distributed as softmax(logits / T) (Gumbel 1954; Maddison et al.
    2014, arXiv:1411.0030). So a draw does not depend on what else is in the batch.

    Args:
        rows: of each (temperature, seed); at temperature 0 its logits stay.
    """

    def __init__(self, rows: Sequence[tuple[float, int]]) -> None:
        drawn = [(row, heat, seed) for row, (heat, seed) in enumerate(rows) if heat > 0]
        self._rows = [(row, heat, seeding.generator(seed, "caption tokens")) for row, heat, seed in drawn]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V] of the next token, in fp32."""
        scores = scores.float().clone()
        for row, temperature, generator in self._rows:
            uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64).clamp_min(1e-300)
            gumbel = -torch.log(-torch.log(uniform).clamp_max(-1e-300))
            scores[row] = scores[row] / temperature + gumbel.to(scores)
        return scores


def _processor(folder: Path, ours: dict[str, Any]) -> Any:
    try:
        processor = _read_processor(folder, ours)
    except ImportError as error:
        told = " ".join(str(error).split("\n\n")[0].split()) or "a library is missing"
        hint = "install the library that it names, or serve the model elsewhere and name its `endpoint`"
        raise ModelError(f"its processor cannot be used ({told[:200]})", where=folder, hint=hint) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelError("has no processor for pictures and text", where=folder, hint="use a vision-language model")
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        hint = "use a model that was trained to answer questions (its name often ends in -Instruct or -it)"
        raise ModelError("has no chat template: it cannot be asked", where=folder, hint=hint)
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = tokenizer.chat_template
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError("its tokenizer has neither a padding nor an end token", where=folder, hint="use another model")
    return processor


def _read_processor(folder: Path, ours: dict[str, Any]) -> Any:
    """As transformers reads it; where torchvision is missing without the part for videos, which alone needs it.

    Raises:
        ImportError: its part for pictures needs a library that is not there, too.
    """
    try:
        return AutoProcessor.from_pretrained(folder, **ours)
    except ImportError:
        kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder, **ours)), None)
        parts = [] if kind is None else kind.get_attributes()
        if is_torchvision_available() or parts[-1:] != ["video_processor"]:
            raise
    picture_kind: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: parts[:-1])})
    return picture_kind.from_pretrained(folder, **ours)


def _inputs(processor: Any, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Any:
    """A batch of questions as tensors."""
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts]
    more = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False, **more)
    first = processor.tokenizer.bos_token
    twice = {"add_special_tokens": False} if first is not None and texts[0].startswith(first) else {}
    images = [[picture] for picture in pictures]
    try:
        return processor(text=texts, images=images, padding=True, return_tensors="pt", **twice)
    except ValueError as error:  # as Qwen's says it of a picture that is 200 times as wide as high
        raise _PictureRefused(str(error).strip().partition("\n")[0]) from error


def _end_tokens(model: Any) -> set[int]:
    told = model.generation_config.eos_token_id
    return set() if told is None else {told} if isinstance(told, int) else set(told)

"""One part of a model from its folder, through diffusers or transformers, with what they say of a broken one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from libreflux.errors import LibrefluxError, ModelError
from libreflux.model.parts import COPY, check_part, check_tokenizer, named, visible, weight_variant
from libreflux.model.single_file import TOKENIZERS, TensorFile, file_config, load_text_encoder
from libreflux.model.text import TextEncoders


def load_part(kind: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A diffusers model whose every tensor came from the file; diffusers itself only warns of missing ones."""
    check_part(folder)
    with one_line(folder):
        part, found = kind.from_pretrained(
            folder,
            torch_dtype=dtype or _stored_dtype(folder),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            variant=weight_variant(folder),
        )
    _check_keys(folder, found, ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return part.requires_grad_(False).eval()


def load_text(where: Mapping[str, Path | TensorFile], dtype: torch.dtype | None) -> TextEncoders:
    """Both text encoders and their tokenizers, each from its folder or file."""
    encoders: list[Any] = []
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    for part, kind in kinds.items():
        place = where[part]
        if isinstance(place, TensorFile):
            encoders.append(load_text_encoder(place, part, file_config(place, part), dtype))
            continue
        check_part(place)
        with one_line(place):
            encoder, found = kind.from_pretrained(
                place,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=weight_variant(place),
            )
        # Unexpected keys are left to transformers: full T5 and CLIP files carry decoders and position ids.
        _check_keys(place, found, ("missing_keys", "mismatched_keys", "error_msgs"))
        encoders.append(encoder.requires_grad_(False).eval())
    first, second = (Path(str(where[part])) for part in TOKENIZERS)
    check_tokenizer(first, ("tokenizer.json", "vocab.json"))
    with one_line(first):
        clip_tokenizer = CLIPTokenizer.from_pretrained(first, local_files_only=True)
    check_tokenizer(second, ("tokenizer.json", "spiece.model"))
    with one_line(second):
        t5_tokenizer = T5Tokenizer.from_pretrained(second, local_files_only=True)
    for folder, tokenizer, encoder in ((first, clip_tokenizer, encoders[0]), (second, t5_tokenizer, encoders[1])):
        known, read = len(tokenizer), encoder.config.vocab_size
        if known > read:
            raise ModelError(f"knows {known} tokens, its encoder {read}", where=folder, mend="use the encoder's own")
    return TextEncoders(clip_tokenizer, encoders[0], t5_tokenizer, encoders[1])


def _check_keys(folder: Path, found: dict[str, Any], kinds: Sequence[str]) -> None:
    for kind in kinds:
        if found.get(kind):
            names = [str(key) for key in found[kind]]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(
                f"{kind.replace('_', ' ')}: {min(names)}{more}", where=folder, mend="the weights and config.json differ"
            )


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the part's first floating tensor, in the files that are read."""
    from safetensors import safe_open

    single = folder / named("diffusion_pytorch_model.safetensors", weight_variant(folder))
    for file in [single] if single.is_file() else visible(folder, "*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _DTYPES:
                    return _DTYPES[dtype]
    return torch.float32


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextlib.contextmanager
def one_line(where: Path) -> Iterator[None]:
    """Whatever diffusers, transformers or safetensors say of a broken part, on one line."""
    try:
        yield
    except LibrefluxError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        if "ignore_mismatched_sizes" in reason:  # transformers refers to a report of several lines, see _quiet
            reason = "its tensors have other sizes than config.json says"
        raise ModelError(f"cannot be loaded ({reason})", where=where, mend=COPY) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars, which flicker by in a second, and reports on tensors, of which we say what matters."""
    libraries = [kind.utils.logging for kind in (diffusers, transformers)]
    before = [(each.is_progress_bar_enabled(), each.get_verbosity()) for each in libraries]
    for each in libraries:
        each.disable_progress_bar()
        each.set_verbosity_error()
    try:
        yield
    finally:
        for each, (bars, verbosity) in zip(libraries, before, strict=True):
            if bars:
                each.enable_progress_bar()
            each.set_verbosity(verbosity)

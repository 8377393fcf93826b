"""One part of a model from its folder, through diffusers or transformers, with what they say of a broken one."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from libreflux.errors import LibrefluxError, ModelError, RunError
from libreflux.model.by_block import run_by_block
from libreflux.model.checksums import verified_part
from libreflux.model.device_faults import is_device_error, is_out_of_memory
from libreflux.model.parts import COPY, check_part, check_tokenizer, named, visible, weight_variant
from libreflux.model.ranges import RangedFile
from libreflux.model.single_file import TensorFile, file_config, load_text_encoder
from libreflux.model.text import TextEncoders
from libreflux.printing import counted


def load_part(kind: Any, folder: Path, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> Any:
    """A diffusers model whose every tensor came from the file; diffusers itself only warns of missing ones.

    Each tensor goes to the device as it is read; on the CPU, in the dtype that is stored, it stays mapped.
    """
    with verified_part(folder):
        return _load_part(kind, folder, dtype, device)


def _load_part(kind: Any, folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> Any:
    check_part(folder)
    options = {"torch_dtype": dtype or _stored_dtypes(folder)[0]}
    part, found = _read_to(kind, folder, device, **options)
    _check_keys(folder, found, ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    part.__dict__.pop("hf_device_map", None)  # it is one part on one device, free to move
    return part.requires_grad_(False).eval().to(device)


def load_text(
    where: Mapping[str, Path | TensorFile],
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    *,
    by_block: bool = False,
) -> TextEncoders:
    """Both text encoders and their tokenizers, each from its folder or file.

    Args:
        where: folders or files of both encoders, folders of both tokenizers.
        dtype: of the weights; None keeps what is stored.
        device: where to, tensor by tensor.
        by_block: the weights stay on the CPU, where `dtype` is wider as they are stored, see `by_block.run_by_block`.
    """
    place, resting = ("cpu" if by_block else device), by_block and dtype == torch.float32
    encoders = [_load_encoder(where[part], part, dtype, place, as_stored=resting) for part in _ENCODERS]
    for encoder in encoders if by_block else ():
        run_by_block(encoder, device, dtype if resting else None)
    clip_tokenizer = _load_clip_tokenizer(first := Path(str(where["tokenizer"])))
    t5_tokenizer = load_t5_tokenizer(second := Path(str(where["tokenizer_2"])))
    for folder, tokenizer, encoder in ((first, clip_tokenizer, encoders[0]), (second, t5_tokenizer, encoders[1])):
        known, read = len(tokenizer), encoder.config.vocab_size
        if known > read:
            raise ModelError(
                f"knows {counted(known, 'token')}, its encoder {read}", where=folder, hint="use the encoder's own"
            )
    return TextEncoders(clip_tokenizer, encoders[0], t5_tokenizer, encoders[1], by_block=by_block)


def load_t5_tokenizer(folder: Path) -> T5Tokenizer:
    """T5's tokenizer alone, from its folder."""
    with verified_part(folder), one_line(folder):
        check_tokenizer(folder, ("tokenizer.json", "spiece.model"))
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)


def _load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    with verified_part(folder), one_line(folder):
        check_tokenizer(folder, ("tokenizer.json", "vocab.json"))
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _load_encoder(
    place: Path | TensorFile, part: str, dtype: torch.dtype | None, device: torch.device | str, *, as_stored: bool
) -> Any:
    """`as_stored`: in the narrowest dtype that loses nothing of the file."""
    if isinstance(place, TensorFile):
        return load_text_encoder(place, part, file_config(place, part), dtype, device, as_stored=as_stored)
    with verified_part(place):
        return _load_encoder_folder(place, part, dtype, device, as_stored=as_stored)


def _load_encoder_folder(
    place: Path, part: str, dtype: torch.dtype | None, device: torch.device | str, *, as_stored: bool
) -> Any:
    check_part(place)
    if as_stored:
        dtype = functools.reduce(torch.promote_types, _stored_dtypes(place))
    encoder, found = _read_to(_ENCODERS[part], place, device, dtype=dtype or "auto")
    # Unexpected keys are left to transformers: full T5 and CLIP files carry decoders and position ids.
    _check_keys(place, found, ("missing_keys", "mismatched_keys", "error_msgs"))
    return encoder.requires_grad_(False).eval().to(device)


def _read_to(kind: Any, folder: Path, device: torch.device | str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A part with its tensors placed on the device as they are read, and what its library says of their names."""
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    options["variant"] = weight_variant(folder)
    with one_line(folder), _default_dtype_kept():
        if torch.device(device).type != "cpu":
            # A tensor that no file has cannot be moved, and which one it is only the CPU's way tells.
            with contextlib.suppress(NotImplementedError):
                part, found = kind.from_pretrained(folder, device_map={"": torch.device(device)}, **options)
                return part, found
        part, found = kind.from_pretrained(folder, **options)
        return part, found


@contextlib.contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """diffusers sets torch's default dtype while it makes a model, and leaves it so where that fails."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_keys(folder: Path, found: dict[str, Any], kinds: Sequence[str]) -> None:
    for kind in kinds:
        if found.get(kind):
            names = [str(key) for key in found[kind]]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(
                f"{kind.replace('_', ' ')}: {min(names)}{more}", where=folder, hint="the weights and config.json differ"
            )


def _stored_dtypes(folder: Path) -> list[torch.dtype]:
    """The dtypes of a part's floating tensors, in the files that are read, the first one's first; fp32 for none."""
    found: dict[torch.dtype, None] = {}
    single = folder / named("diffusion_pytorch_model.safetensors", weight_variant(folder))
    for file in [single] if single.is_file() else visible(folder, "*.safetensors"):
        for _, stored in sorted(RangedFile(file).ranges.items()):
            if stored.dtype in _DTYPES:
                found[stored.dtype] = None
    return list(found) or [torch.float32]


_ENCODERS: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def one_line(where: Path) -> Iterator[None]:
    """Whatever diffusers, transformers or safetensors say of a broken part, on one line."""
    try:
        yield
    except LibrefluxError:
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of the tokenizers' library; it is no Exception
            raise ModelError(f"cannot be loaded ({str(error)[:80]})", where=where, hint=COPY) from error
        if not isinstance(error, Exception):
            raise
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or is_device_error(error):
            raise  # whoever opens the part knows what makes it smaller
        if is_out_of_memory(error):  # as a CPU says it, above all of sizes that no model has
            hint = "use a smaller model, or more memory; is its config.json as published?"
            raise RunError("out of memory", where=where, hint=hint) from error
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        if "ignore_mismatched_sizes" in reason:  # transformers refers to a report of several lines, see _quiet
            reason = "its tensors have other sizes than config.json says"
        raise ModelError(f"cannot be loaded ({reason})", where=where, hint=COPY) from error


_LOADING = threading.RLock()
"""Held while the libraries load: they change torch for the whole process meanwhile, and two at once never undo it."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars, which flicker by in a second, and reports on tensors, of which we say what matters.

    One thread at a time.
    """
    with _LOADING, _silenced():
        yield


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
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

"""Open and save a model of the FLUX family: a diffusers folder plus `libreflux.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from libreflux.errors import LibrefluxError, ModelError
from libreflux.files import atomic_write_json, sha256_file, staged_dir
from libreflux.model.facts import Facts, find_facts, read_facts, write_facts
from libreflux.model.int8 import dequantise_model, int8_layers
from libreflux.model.int8_files import METHOD, empty_int8, load_int8, stored_as, stream_int8, weight_files, write_int8
from libreflux.model.locate import PARTS, locate, part_folder
from libreflux.model.parts import COPY, check_fit, check_part, check_tokenizer, json_object
from libreflux.model.text import TextEncoders

__all__ = [
    "Facts",
    "Model",
    "locate",
    "open_model",
    "quantise_folder",
    "read_facts",
    "save_model",
    "weights_hash",
    "write_facts",
]

ALL = ("transformer", "vae", "text")

_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

_MASKED = "FluxTransformer2DModelWithMasking"
"""What the published LibreFLUX weights call their transformer: FLUX's, drawn under text padding `bias`."""


@dataclass
class Model:
    """A model in memory; a part that was not asked for is None.

    Attributes:
        facts: see `Facts`.
        scheduler: diffusers' own, for pipelines other than ours; ours follows `facts.shift`.
        name: what the user called it.
        path: its folder; None for a model that was built in memory.
    """

    facts: Facts
    transformer: FluxTransformer2DModel | None = None
    vae: AutoencoderKL | None = None
    text: TextEncoders | None = None
    scheduler: FlowMatchEulerDiscreteScheduler = field(default_factory=FlowMatchEulerDiscreteScheduler)
    name: str = "unnamed"
    path: Path | None = None


def open_model(
    name: str | Path,
    *,
    parts: Sequence[str] = ALL,
    dtype: torch.dtype | None = None,
    quantise: bool | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Load a model, in evaluation mode.

    Args:
        name: see `locate`.
        parts: any of "transformer", "vae", "text".
        dtype: of the weights, in an int8 transformer of those that are not int8; None keeps what is stored.
        quantise: True: the transformer in int8, quantised tensor by tensor if it is stored otherwise; False: dense,
            scale * q where it is stored in int8; None: as stored.
        device: where to.

    Raises:
        ModelError: no such model, a part of another kind, or a damaged one.
    """
    if unknown := set(parts) - set(ALL):
        raise ValueError(f"unknown parts {sorted(unknown)}, wanted some of {ALL}")
    path = locate(name, weights=False)
    config = json_object(path / "transformer" / "config.json")
    if config.get("_class_name") not in ("FluxTransformer2DModel", _MASKED):
        mend = "use a model of the FLUX.1 family"
        raise ModelError(f"its transformer is a {config.get('_class_name')}", where=path, mend=mend)
    path = locate(name) if parts else path
    model = Model(
        facts=find_facts(
            str(name),
            path,
            guidance_embeds=bool(config.get("guidance_embeds", False)),
            masked=config.get("_class_name") == _MASKED,
        ),
        name=str(name),
        path=path,
    )
    if model.facts.guidance_embeds != bool(config.get("guidance_embeds", False)):
        raise ModelError(
            "guidance_embeds in libreflux.json is not the transformer's", where=path, mend="correct the file"
        )
    in_int8 = stored_as(config, path) == METHOD
    with _quiet():
        if (scheduler := part_folder(path, "scheduler")).is_dir():
            json_object(scheduler / "scheduler_config.json")
            with _part(scheduler):
                model.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler, local_files_only=True)
        if "transformer" in parts and (in_int8 or quantise):
            check_part(path / "transformer", neighbours=in_int8)
            with _part(path / "transformer"):
                model.transformer = load_int8(path / "transformer", dtype=dtype, device=device)
                if quantise is False:
                    dequantise_model(model.transformer, model.transformer.dtype)
        elif "transformer" in parts:
            model.transformer = _diffusers_part(FluxTransformer2DModel, path / "transformer", dtype).to(device)
        if "vae" in parts:
            model.vae = _diffusers_part(AutoencoderKL, part_folder(path, "vae"), dtype).to(device)
        if "text" in parts:
            model.text = _text(path, dtype).to(device)
    check_fit(path, model.transformer, model.vae, model.text)
    return model


def save_model(model: Model, out: Path) -> Path:
    """Write a model as a folder that `open_model` and, unless it is int8, diffusers' `FluxPipeline` load.

    Parts that are not in memory are copied from `model.path`. The folder appears complete or not at all.

    Raises:
        ModelError: a part is neither in memory nor on disk.
        RunError: `out` exists.
    """
    with staged_dir(Path(out)) as staging, _quiet():
        live = _live_parts(model)
        for part in PARTS:
            if part == "transformer" and part in live and int8_layers(live[part]):
                write_int8(staging / part, json.loads(live[part].to_json_string()), live[part].state_dict().items())
            elif part in live:
                live[part].save_pretrained(staging / part)
            elif model.path is not None and (stored := part_folder(model.path, part)).is_dir():
                shutil.copytree(stored, staging / part)  # follows the hub cache's links
            else:
                raise ModelError(f"has no {part} to save", where=model.name, mend="open it with all its parts")
        index = {**_INDEX, "_diffusers_version": diffusers.__version__}
        atomic_write_json(staging / "model_index.json", index)
        write_facts(staging, dataclasses.replace(model.facts, parts_from=None))
    return Path(out)


def quantise_folder(name: str | Path, out: Path) -> Path:
    """Write a model in int8, as a folder that `open_model` loads; one dense tensor and one shard are held at a time.

    Args:
        name: of a model in floating point, see `locate`.
        out: appears complete or not at all.

    Raises:
        ModelError: no such model, a damaged one, or one that is quantised already.
        RunError: `out` exists.
    """
    model = open_model(name, parts=())
    assert model.path is not None
    source = model.path / "transformer"
    if stored_as(json_object(source / "config.json"), source) == METHOD:
        raise ModelError("is stored in int8", where=source, mend="use it as it is")
    check_part(source)
    with _part(source):
        empty = empty_int8(source)
    with staged_dir(Path(out)) as staging:
        write_int8(staging / "transformer", json_object(source / "config.json"), stream_int8(source, empty))
        for part in PARTS:
            if part != "transformer" and (stored := part_folder(model.path, part)).is_dir():
                shutil.copytree(stored, staging / part)
        shutil.copyfile(model.path / "model_index.json", staging / "model_index.json")
        origin = {"how": METHOD, "from": str(name), "sha256": weights_hash(model.path)}
        lineage = {**model.facts.lineage, "quantised": origin}
        write_facts(staging, dataclasses.replace(model.facts, lineage=lineage, parts_from=None))
    return Path(out)


def weights_hash(folder: Path) -> str:
    """SHA-256 over the transformer's safetensors files, names included: which weights drew a picture."""
    digest = hashlib.sha256()
    for file in weight_files(folder / "transformer"):
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _live_parts(model: Model) -> dict[str, Any]:
    live: dict[str, Any] = {"transformer": model.transformer, "vae": model.vae, "scheduler": model.scheduler}
    if model.text is not None:
        live |= {part: getattr(model.text, part) for part in PARTS if part.startswith(("text_encoder", "tokenizer"))}
    return {name: part for name, part in live.items() if part is not None}


def _diffusers_part(kind: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A diffusers model whose every tensor came from the file; diffusers itself only warns of missing ones."""
    check_part(folder)
    with _part(folder):
        part, found = kind.from_pretrained(
            folder,
            torch_dtype=dtype or _stored_dtype(folder),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    _check_keys(folder, found, ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return part.requires_grad_(False).eval()


def _text(path: Path, dtype: torch.dtype | None) -> TextEncoders:
    encoders = []
    for kind, part in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2")):
        folder = part_folder(path, part)
        check_part(folder)
        with _part(folder):
            encoder, found = kind.from_pretrained(
                folder, dtype=dtype or "auto", use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        # Unexpected keys are left to transformers: full T5 and CLIP files carry decoders and position ids.
        _check_keys(folder, found, ("missing_keys", "mismatched_keys", "error_msgs"))
        encoders.append(encoder.requires_grad_(False).eval())
    first, second = part_folder(path, "tokenizer"), part_folder(path, "tokenizer_2")
    check_tokenizer(first, ("tokenizer.json", "vocab.json"))
    with _part(first):
        clip_tokenizer = CLIPTokenizer.from_pretrained(first, local_files_only=True)
    check_tokenizer(second, ("tokenizer.json", "spiece.model"))
    with _part(second):
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
    """The dtype of the part's first floating tensor."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _DTYPES:
                    return _DTYPES[dtype]
    return torch.float32


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextlib.contextmanager
def _part(where: Path) -> Iterator[None]:
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
def _quiet() -> Iterator[None]:
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

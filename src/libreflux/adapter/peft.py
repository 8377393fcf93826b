"""What PEFT and diffusers keep beside a LoRA's tensors: the alpha and rank of its layers.

PEFT writes a folder, `adapter_model.safetensors` and `adapter_config.json`; diffusers the same configuration as JSON
into a file's metadata; some trainers `lora_alpha` alone, as plain metadata.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from libreflux import plainjson
from libreflux.errors import AdapterError

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration, as JSON."""
CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""The adapter in a folder of PEFT's, and of diffusers'."""
PREFIX = "base_model.model."
"""Before all names in PEFT's own files, which tell no scale."""

_OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq")
"""Starts of a LoRA that change the base's weights too."""
_PLAIN = ("lora_alpha", "use_rslora")
_PATIENCE = 0.25
"""Seconds that the patterns of one file may take in all: a stranger's may be made to take for ever."""
_LONGEST = 500
"""Characters of a pattern."""
_MOST_ALPHA = 1e6
"""Beyond this an alpha is no one's intention."""
_PLAIN_NAME = regex.compile(r"[\w.]+")


class Config(dict[str, Any]):
    """PEFT's configuration of an adapter.

    Attributes:
        left: seconds that its patterns may still take.
    """

    left: float = _PATIENCE


def file_in(folder: Path) -> Path | None:
    """The adapter file in a folder that PEFT or diffusers wrote; None in any other."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def config_of(path: Path, metadata: Mapping[str, str]) -> Config | None:
    """PEFT's configuration of an adapter file: of the file beside it, or in its metadata; None where there is none.

    Args:
        path: the adapter file.
        metadata: its own.

    Raises:
        AdapterError: one that cannot be read, or of another kind of adapter.
    """
    beside = path.with_name(CONFIG)
    has_config = path.name == FILES[0] and beside.is_file()
    try:
        if has_config:
            where, told = str(beside), plainjson.parse(beside.read_text(encoding="utf-8"))
            if told.get("lora_alpha") is None and told.get("peft_type", "LORA") == "LORA":
                raise ValueError("no lora_alpha in it")
        elif METADATA in metadata:
            where, told = f"{path}, {METADATA}", plainjson.parse(metadata[METADATA])
        else:
            where, plain = str(path), {key.removeprefix("transformer."): value for key, value in metadata.items()}
            told = {key: plainjson.parse(plain[key].lower()) for key in _PLAIN if key in plain}
            if "lora_alpha" not in told:
                return None
        config = Config({str(key).removeprefix("transformer."): value for key, value in told.items()})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        damaged = CONFIG if has_config else METADATA if METADATA in metadata else "lora_alpha"
        raise AdapterError(f"damaged {damaged} ({error})", where=path, hint="copy it again") from None
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name, False), bool | None):
            hint = "write true or false"
            raise AdapterError(f"{name} cannot be {str(config[name])[:20]!r}", where=where, hint=hint)
    kind, start = config.get("peft_type", "LORA"), str(config.get("init_lora_weights", "")).lower()
    if kind != "LORA":
        raise AdapterError(f"{kind} is not read", where=where, hint="use a LoRA, or a LoKr of LyCORIS")
    if start.startswith(_OTHER_WEIGHTS):
        hint = "convert it to a plain LoRA with PEFT"
        raise AdapterError(
            f"init_lora_weights is {start}: it changes the model's own weights too", where=where, hint=hint
        )
    return config


def alpha_of(config: Config, layer: str, rank: int, where: str) -> float | None:
    """alpha of one layer, of which LyCORIS' scale is alpha / rank; None where nothing tells one.

    Args:
        config: see `config_of`.
        layer: its name.
        rank: of its tensors.
        where: the file, for errors.

    Raises:
        AdapterError: another rank than the tensors', values of another kind, or patterns that take too long to match.
    """
    try:
        told = _of_layer(config, "rank_pattern", layer, config.get("r"))
        if told is not None and int(told) != rank:
            hint = "use the configuration that it was saved with"
            raise AdapterError(f"rank {told} is told of {layer}, its tensors have {rank}", where=where, hint=hint)
        alpha = _of_layer(config, "alpha_pattern", layer, config.get("lora_alpha"))
        if alpha is None:
            return None
        if isinstance(alpha, bool) or not abs(float(alpha)) < _MOST_ALPHA:  # NaN too
            raise ValueError(f"alpha {str(alpha)[:20]} is told of {layer}")
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    except _TooLongError as error:
        hint = "name the layers in it by their plain names"
        raise AdapterError(f"its {error} takes too long to match", where=where, hint=hint) from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, regex.error) as error:
        raise AdapterError(f"damaged {CONFIG} or {METADATA} ({error})", where=where, hint="copy it again") from None


def _of_layer(config: Config, pattern: str, layer: str, otherwise: Any) -> Any:
    """An exception by layer, as PEFT matches them: the end of a name, from a dot on."""
    exceptions = config.get(pattern) or {}
    if not exceptions:
        return otherwise
    began = time.monotonic()
    try:
        return next((value for key, value in exceptions.items() if _matches(config, key, layer, began)), otherwise)
    except TimeoutError:
        raise _TooLongError(pattern) from None
    finally:
        config.left -= time.monotonic() - began


def _matches(config: Config, key: str, layer: str, began: float) -> bool:
    if _PLAIN_NAME.fullmatch(key):
        return layer == key or layer.endswith(f".{key}")
    if len(key) > _LONGEST or "{" in key:  # made ready without a limit of time: counted repeats take all memory
        raise TimeoutError
    left = config.left - (time.monotonic() - began)
    if left <= 0:
        raise TimeoutError
    return regex.match(rf"(.*\.)?({key})$", layer, timeout=left) is not None


class _TooLongError(Exception):
    """A pattern that takes too long to match."""

"""From what a user calls a vision-language model to a folder. Loads no torch."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.errors import ModelError
from libreflux.files import sha256_file
from libreflux.model.locate import LOGIN, hub_reason
from libreflux.places import did_you_mean

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WANTED = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
_NOT_WANTED = ["*/*", "consolidated*"]
"""What lies in folders of a model's page, and the same weights under its makers' own names."""


def find_vision_model(name: str) -> Path:
    """The folder of a model: a local one, or of a hub id "org/name@revision" what was downloaded, now or before.

    Only safetensors, JSON, tokenizer files and chat templates come, and no code.

    Raises:
        ModelError: no such folder, or the download failed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(name) or ".." in name or path.parent.is_dir():
        hint = did_you_mean(path, "name a folder of a vision-language model, or a hub id like org/name")
        raise ModelError("no such folder", where=name, hint=hint)
    import huggingface_hub

    hub_id, _, revision = name.partition("@")
    wanted: dict[str, Any] = {"repo_id": hub_id, "revision": revision or None}
    wanted |= {"allow_patterns": _WANTED, "ignore_patterns": _NOT_WANTED}
    with contextlib.suppress(Exception):  # nothing stored: then ask the hub
        here = Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
        if _is_whole(here):
            return here
    try:
        return Path(huggingface_hub.snapshot_download(**wanted))
    except Exception as error:  # the client's own, its HTTP library's, the disk's: no common ancestor
        hint = f"correct the path, or check the id and the network; of a gated model {LOGIN}"
        told = f"no folder of this name, and it cannot be had from the hub ({hub_reason(error)})"
        raise ModelError(told, where=name, hint=hint) from error


def identity(folder: Path) -> str:
    """Digits of which model it is: its configuration, its chat template, and the names and sizes of its weights."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("[!.]*.safetensors")):
        total.update(f"{file.name}:{file.stat().st_size}\n".encode())
    for file in sorted([*folder.glob("[!.]*config.json"), *folder.glob("[!.]*.jinja")]):
        total.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return total.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    """Whether an earlier download got to its end."""
    try:
        indexes = folder.glob("[!.]*.safetensors.index.json")
        tables = [plainjson.parse(index.read_text(encoding="utf-8"))["weight_map"] for index in indexes]
        shards = {str(shard) for table in tables for shard in table.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    whole = (folder / "config.json").is_file() and any(folder.glob("[!.]*.safetensors"))
    return whole and all((folder / shard).is_file() for shard in shards)

"""From what a user calls a model to a folder: emoji models, local folders, hub ids."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.errors import ModelError, OptionHint
from libreflux.model.facts import FACTS_FILE, KNOWN, known_facts, needs_login, read_facts
from libreflux.places import nearest

INT8 = "libreflux_int8"
"""How our own int8 folders call their format in config.json."""
WEIGHTS = Path(__file__).resolve().parent.parent / "emoji" / "weights"
EMOJI = ("emoji-base", "emoji-schnell", "emoji-libre")
CHECKSUMS = "checksums.json"
"""In a model's folder, see `model.checksums`."""
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Only what the parts need: no Python, and not the single-file copies of the weights that lie beside the parts.
_SMALL = ["model_index.json", FACTS_FILE, CHECKSUMS] + [
    f"{part}/{pattern}" for part in PARTS for pattern in ("*.json", "*.model", "*.txt")
]

LOGIN = "accept its licence on its page at the hub and log in with `hf auth login`"
_FOLDER = "give a diffusers folder or a hub id"
_PICKLE = ("is a pickle, which runs code when it is opened", "use the model's safetensors files")
_REFUSED = dict.fromkeys((".ckpt", ".pt", ".pth", ".bin", ".pkl"), _PICKLE) | {
    ".safetensors": (
        "is a single file",
        "`libreflux export` for diffusers, with its base, makes a model of it",
    ),
    ".gguf": ("GGUF is not read", "use the safetensors weights; `libreflux export` in int8 makes them small"),
}


def locate(name: str | Path, *, weights: bool | Collection[str] = True, fetch: bool = True) -> Path:
    """The folder of a model.

    Args:
        name: "emoji-base" and its kin; a local folder; or a hub id "org/name" with an optional "@revision". A hub id is
            downloaded once, safetensors, JSON and tokenizer files only, and found without the network after that. The
            network is touched for nothing else: no name without "/" is a hub id, none below an existing local folder.
        weights: of a hub id, the parts whose weights are wanted; True: all; False: none, only what is small,
            configurations and tokenizers.
        fetch: whether the hub may be asked; False where the name comes out of a file, see `told_model`.

    Raises:
        ModelError: there is no such model, or the download failed.
    """
    text = str(name)
    if not text:  # as a path it would be the folder that one stands in
        raise ModelError("no model is named", hint=_suggestion(text, None))
    path = Path(os.path.expanduser(text))
    if text in EMOJI and not path.exists():
        path = WEIGHTS / text
        if not path.is_dir():
            here = sorted(child.name for child in WEIGHTS.glob("*") if child.is_dir())
            raise ModelError(
                f"this installation does not contain {text}", hint=f"use {' or '.join(here) or 'another model'}"
            )
    if path.is_dir():
        return _checked(path)
    if path.exists():
        told, hint = _REFUSED.get(path.suffix.lower(), ("is neither a folder nor a .safetensors file", _FOLDER))
        raise ModelError(told, where=path, hint=hint)
    steps_out = ".." in re.split("[/@]", text)  # the hub's client would take it for a folder of its cache
    if not _HUB_ID.fullmatch(text) or steps_out or Path(text).parts[0] == "." or Path(text).parent.is_dir():
        raise ModelError(f"no such model: {text}", hint=_suggestion(text, path))
    return _checked(_download(text, PARTS if weights is True else weights or (), fetch=fetch))


def stored(name: str) -> bool:
    """Whether a model is here, weights and all; nobody is asked."""
    try:
        locate(name, fetch=False)
    except ModelError:
        return False
    return True


def told_model(name: str, told_by: object) -> str:
    """A model that a file names, and not the user: taken where it is here already, never fetched.

    Args:
        name: what the file says.
        told_by: the file.

    Raises:
        ModelError: it is not here.
    """
    try:
        locate(name, fetch=False)
    except ModelError as error:
        hint = OptionHint("name the model yourself with `model`; nothing is downloaded because a file says so")
        raise ModelError(f"its model {name} is not at hand ({error.what})", where=told_by, hint=hint) from None
    return name


def part_folder(folder: Path, part: str) -> Path:
    """Where a part of a located model is: in its own folder, or in the one beside it that its facts name.

    Raises:
        ModelError: unreadable facts.
    """
    own = folder / part
    if own.is_dir() or not (folder / FACTS_FILE).is_file():
        return own
    told = read_facts(folder).parts_from
    return own if told is None else folder.parent / told / part


def _checked(folder: Path) -> Path:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError("not a model: it has no model_index.json", where=folder, hint="give a diffusers FLUX folder")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        where = part_folder(folder, part)
        if not where.is_dir():
            if part.startswith("text"):
                continue  # ready-made conditioning needs none
            raise ModelError(f"incomplete: it has no {part} folder", where=folder, hint="give a diffusers FLUX folder")
        names = [file for file in where.iterdir() if not file.name.startswith("._")]  # those are macOS' own
        found = {file.suffix for file in names if file.suffix in _REFUSED}
        if found and ".safetensors" not in found:
            _refuse_format(where)
            told, hint = _REFUSED[min(found)]
            raise ModelError(f"has no safetensors: what it has {told}", where=where, hint=hint)
    return folder


def foreign_format(config: Mapping[str, Any]) -> str | None:
    """What a part's config.json says that its weights are quantised by, if that is another program."""
    told = config.get("quantization_config")
    if not told:
        return None
    if not isinstance(told, dict):
        return str(told)[:60]
    if (method := told.get("quant_method")) == INT8:
        return None
    detail = told.get("bnb_4bit_quant_type") or told.get("quant_type") or ("8 bit" if told.get("load_in_8bit") else "")
    return f"{method}{f' ({str(detail)[:60]})' if detail else ''}"


FOREIGN_HINT = "use the model in bf16 or fp32; `libreflux export` in int8 makes it small"


def _refuse_format(part: Path) -> None:
    """Raises ModelError for a part whose config.json names a format that is not read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = plainjson.parse((part / "config.json").read_text(encoding="utf-8"))
        if told := foreign_format(config):
            raise ModelError(f"is quantised by {told}, which is not read", where=part, hint=FOREIGN_HINT)


def _suggestion(text: str, path: Path | None) -> str:
    hub_ids = {hub_id.rpartition("/")[2].casefold(): hub_id for hub_id in KNOWN}
    if near := difflib.get_close_matches(text, EMOJI, n=1):
        return f"did you mean {near[0]}?"
    if path is not None and (there := nearest(path)) is not None:
        return f"did you mean {there}?"
    if near := difflib.get_close_matches(text.casefold(), hub_ids, n=1, cutoff=0.75):
        return f"did you mean {hub_ids[near[0]]}?"
    return f"use {EMOJI[0]}, an existing folder, or a hub id like org/name"


def _download(text: str, weights: Collection[str], *, fetch: bool) -> Path:
    import huggingface_hub

    hub_id, _, revision = text.partition("@")
    wanted: dict[str, Any] = {
        "repo_id": hub_id,
        "revision": revision or None,
        "allow_patterns": _SMALL + [f"{part}/*.safetensors" for part in weights],
    }
    with contextlib.suppress(Exception):  # nothing stored, or an older client's cache: then ask the hub
        here = Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
        if _complete(here, weights):
            return here
    if not fetch:
        raise ModelError("not downloaded before", where=text, hint="name it yourself to download it")
    try:
        return Path(huggingface_hub.snapshot_download(**wanted))
    except Exception as error:  # the client's own, its HTTP library's, the disk's: no common ancestor
        raise ModelError(
            f"no folder of this name, and it cannot be had from the hub ({hub_reason(error)})",
            where=text,
            hint=_download_hint(hub_id, error),
        ) from error


def _download_hint(hub_id: str, error: Exception) -> str:
    from huggingface_hub import errors

    there = nearest(Path(os.path.expanduser(hub_id)))
    if there is not None and (there / "model_index.json").is_file():
        return f"did you mean {there}?"
    near = difflib.get_close_matches(hub_id, KNOWN, n=1, cutoff=0.8)
    if near and known_facts(hub_id) is None:
        return f"did you mean {near[0]}? or correct the path, or check the id and the network"
    if needs_login(hub_id) or isinstance(error, errors.GatedRepoError):
        return f"correct the path, or check the id and the network; for this model {LOGIN}"
    refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
    login = "; a private or gated model wants `hf auth login`" if refused else ""
    return f"correct the path, or check the id and the network{login}"


def hub_reason(error: BaseException) -> str:
    """Why a download failed, in a few words."""
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: "its owner asks for a login and consent",
        errors.RepositoryNotFoundError: "no such model there, or a private one",
        errors.RevisionNotFoundError: "no such revision there",
        errors.LocalEntryNotFoundError: "not downloaded before, and the hub cannot be reached",
    }
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _complete(folder: Path, weights: Collection[str]) -> bool:
    """Whether an earlier download got to its end: every part is there, with every shard that its index names."""
    try:
        index = plainjson.parse((folder / "model_index.json").read_text(encoding="utf-8"))
        shards = [
            table.parent / shard
            for part in weights
            for table in folder.glob(f"{part}/[!.]*.safetensors.index*.json")  # of a variant, e.g. fp16, too
            for shard in set(plainjson.parse(table.read_text(encoding="utf-8"))["weight_map"].values())
        ]
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    wanted = [part for part in PARTS if isinstance(index.get(part), list) and index[part][0] is not None]
    weighty = [part for part in wanted if part in weights and not part.startswith("tokenizer") and part != "scheduler"]
    return (
        all((folder / part).is_dir() for part in wanted)
        and all(any((folder / part).glob("[!.]*.safetensors*")) for part in weighty)
        and all(shard.is_file() for shard in shards)
    )

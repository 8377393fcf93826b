"""What pydantic says of a bad recipe, as one line that names the key and the hint."""

from __future__ import annotations

import difflib
import reprlib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from libreflux.errors import RecipeError

Section = type[BaseModel]
ELSEWHERE = {
    "optimizer.learning_rate": "lr unet_lr",
    "optimizer.warmup": "lr_warmup_steps warmup_steps",
    "optimizer.schedule": "lr_scheduler scheduler",
    "optimizer.clip": "max_grad_norm gradient_clipping",
    "optimizer.kind": "optimizer_type use_8bit_adam",
    "adapter.rank": "network_dim network_rank lora_rank",
    "adapter.alpha": "network_alpha lora_alpha",
    "adapter.kind": "network_type network_module lora_type",
    "steps": "max_train_steps max_steps num_steps num_train_steps train_steps epochs max_train_epochs num_train_epochs",
    "batch": "batch_size train_batch_size per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps gradient_accumulation grad_accum",
    "model": "pretrained_model_name_or_path pretrained_model base_model model_name model_path checkpoint",
    "base": "mixed_precision dtype precision quantize base_model_precision",
    "out": "output_dir output output_path save_dir logging_dir",
    "data.0.path": "instance_data_dir train_data_dir data_dir dataset dataset_path folder_path instance_dir images",
    "data.0.repeats": "num_repeats",
    "data.0.caption_dropout": "caption_dropout_rate caption_dropout_probability",
    "save.every": "checkpointing_steps save_every_n_steps save_steps save_every",
    "save.keep": "checkpoints_total_limit save_total_limit max_step_saves_to_keep",
    "samples.every": "validation_steps sample_every_n_steps sample_every",
    "samples.prompts": "validation_prompt validation_prompts sample_prompts",
    "guidance": "guidance_scale cfg cfg_scale",
    "seed": "random_seed manual_seed",
    "cache": "cache_dir cache_latents cache_latents_to_disk",
    "held_out.share": "validation_split",
}
"""Keys of a recipe, and what other trainers usually call them."""
_ALIASES = {name: key for key, names in ELSEWHERE.items() for name in names.split()}


def explain(error: ValidationError, where: str, root: Section) -> RecipeError:
    """The most telling fault, an unknown key before others, and how many more there are.

    Args:
        error: of validating a tree against ``root``.
        where: the recipe's file.
        root: whose keys are known.
    """
    faults: dict[tuple[str | int, ...], Any] = {}
    for one in error.errors():
        faults.setdefault(_key_path(one["loc"]), one)
    # A list with a wrong item is also told to be too short: only the innermost faults count.
    inner = {
        path: one for path, one in faults.items() if not any(path == other[: len(path)] != other for other in faults)
    }
    path, fault = min(inner.items(), key=lambda item: item[1]["type"] != "extra_forbidden")
    key = ".".join(_short(str(part)) for part in path)
    if fault["type"] == "extra_forbidden":
        what, hint = "unknown key", _nearest(path, root)
    elif fault["type"] == "missing" and isinstance(path[-1], str):
        what = "this key is needed"
        hint = f"add it: {keys_of(section_at(path[:-1], root))[path[-1]].description}"
    else:
        what = _told(fault)
        name, field = _field(path, root) or ("", None)
        hint = f"{name} is {field.description}" if field else "change one of the keys that this names"
    if len(inner) > 1:
        what += f" (and {len(inner) - 1} more)"
    return RecipeError(what, where=f"{where}: {key}" if key else where, hint=hint)


def _told(fault: Any) -> str:
    """pydantic's words, with the value, in the terms of YAML."""
    if fault["type"] == "missing":
        return "too few items"
    what = str(fault["msg"]).removeprefix("Value error, ").replace("valid tuple", "list")
    if fault["type"] in ("model_type", "dict_type"):
        what = "Input should be a mapping of keys to values"
    value = _brief.repr(fault["input"])
    if fault["type"] != "value_error":
        return f"{what}, not {value}"
    # A section's own rules name its keys.
    return what if value in what or isinstance(fault["input"], dict) else f"{what} (found {value})"


class _Brief(reprlib.Repr):
    """A value in some 80 characters: a recipe may hold a number of 5,000 digits, or lists within lists without end."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring = 2, 4, 3, 60

    def repr_int(self, x: int, level: int) -> str:
        return f"{float(x):.3g}" if 10**20 < abs(x) < 10**300 else "a huge number" if abs(x) >= 10**300 else repr(x)


_brief = _Brief()


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _key_path(loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """Without the tags of a union (`dict[…]`, `list[…]`), which are no keys of the user's."""
    return tuple(part for part in loc if isinstance(part, int) or part == loc[-1] or "[" not in part)


def _nearest(path: Sequence[str | int], root: Section) -> str:
    wrong, here = _short(str(path[-1])), list(keys_of(section_at(path[:-1], root)))
    if alias := _meant_here(wrong, path[:-1], here):
        return f"did you mean {alias!r}?"
    if close := difflib.get_close_matches(wrong, here, 1, 0.6):
        return f"did you mean {close[0]!r}?"
    deepest_first = sorted(dotted_keys(root), key=lambda key: -key.count("."))
    everywhere = {key.rsplit(".", 1)[-1]: key for key in deepest_first}
    if close := difflib.get_close_matches(wrong, everywhere, 1, 0.75):
        return f"did you mean {everywhere[close[0]]!r}?"
    return f"the keys here are {', '.join(here)}; `libreflux recipe` says what each is"


def _meant_here(name: str, section: Sequence[str | int], here: Sequence[str]) -> str | None:
    """`meant_key` for a name that stands in a section: the section's own key before the root's."""
    key = meant_key(name)
    last = "" if key is None else key.rpartition(".")[2]
    if section and last in here:
        return ".".join(map(str, (*section, last)))
    return None if section and key == last else key


def meant_key(name: str) -> str | None:
    """The recipe's key for what another trainer calls so, with dashes or without; None for other names."""
    return _ALIASES.get(name.strip("-").replace("-", "_").lower())


def keys_of(section: Section) -> dict[str, Any]:
    """Fields by the spelling that a recipe uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_in(annotation: Any) -> Section | None:
    """The section that a field holds, or a list of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_in, typing.get_args(annotation))), None)


def _field(path: Sequence[str | int], root: Section) -> tuple[str, Any] | None:
    """Name and definition of the innermost field on the way to a value; None at the root."""
    for index in reversed(range(len(path))):
        found = keys_of(section_at(path[:index], root)).get(str(path[index]))
        if isinstance(path[index], str) and found:
            return str(path[index]), found
    return None


def section_at(path: Sequence[str | int], root: Section) -> Section:
    """The section that a key, or a value in it, leads to; numbers of list items are passed over."""
    for part in path:
        field = keys_of(root).get(str(part))
        root = (section_in(field.annotation) if field else None) or root
    return root


def dotted_keys(section: Section, prefix: str = "") -> Iterator[str]:
    """Every key below a section, sections included, without numbers of list items."""
    for name, field in keys_of(section).items():
        yield prefix + name
        if inside := section_in(field.annotation):
            yield from dotted_keys(inside, f"{prefix}{name}.")

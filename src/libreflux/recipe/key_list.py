"""The keys of a recipe as a list to read: each with its default, its choices and its meaning."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from libreflux.errors import RecipeError
from libreflux.recipe import Recipe
from libreflux.recipe.faults import dotted_keys, keys_of, meant_key, section_at, section_in


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: dotted, as in an override, a list's items by the number 0.
        meaning: its description.
        default: as YAML; None where the key is needed, or "none" where leaving it out is a value of its own.
        choices: the words that it takes; empty where it takes others.
        section: whether it holds keys of its own.
    """

    name: str
    meaning: str
    default: str | None
    choices: tuple[str, ...] = ()
    section: bool = False

    @property
    def text(self) -> str:
        """Meaning, choices that the meaning does not name, and default, on one line."""
        parts = [self.meaning]
        if any(choice not in self.meaning for choice in self.choices):
            parts.append(f"one of {', '.join(self.choices)}")
        told = "needed" if self.default is None else f"default: {self.default}"
        named = "default:" in self.meaning and self.default == "none"
        hidden = named or (self.section and self.default is not None)
        return f"{'; '.join(parts)}{'' if hidden else f' [{told}]'}"


def recipe_keys(section: str | None = None, *, deep: bool = False) -> list[Key]:
    """The keys of a section, in the order of the schema.

    Args:
        section: dotted, "optimizer"; a key that is no section gives itself; None: the recipe.
        deep: whether the keys of inner sections follow each of them.

    Raises:
        RecipeError: no such key, with the nearest one.
    """
    if section is None:
        return list(_rows(Recipe, "", deep))
    path = [part for part in section.strip().split(".") if not part.isdigit()]
    known = list(dotted_keys(Recipe))
    if ".".join(path) not in known:
        near = difflib.get_close_matches(".".join(path), known, n=1)
        meant = meant_key(path[-1]) or (near[0] if near else None)
        hint = f"did you mean {meant!r}?" if meant else "`libreflux recipe` lists them all"
        raise RecipeError("no such key", where=section, hint=hint)
    field = keys_of(section_at(path[:-1], Recipe))[path[-1]]
    above = "".join(f"{part}." for part in _numbered(path[:-1]))
    own = _key(above + path[-1], field)
    return list(_rows(section_at(path, Recipe), _prefix(own.name, field), deep)) if own.section else [own]


def _rows(section: type[BaseModel], prefix: str, deep: bool) -> Iterator[Key]:
    for name, field in keys_of(section).items():
        yield (key := _key(prefix + name, field))
        if deep and key.section:
            inner = section_in(field.annotation)
            assert inner is not None
            yield from _rows(inner, _prefix(key.name, field), deep)


def _numbered(path: list[str]) -> Iterator[str]:
    for index, part in enumerate(path):
        yield _prefix(part, keys_of(section_at(path[:index], Recipe))[part]).removesuffix(".")


def _prefix(name: str, field: Any) -> str:
    """Of the keys below a section: of a list of sections those of its first item."""
    return f"{name}.0." if _is_list(field.annotation) else f"{name}."


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (tuple, list) or any(map(_is_list, typing.get_args(annotation)))


def _key(name: str, field: Any) -> Key:
    inner, default = section_in(field.annotation), None
    if not field.is_required():
        value = field.default if field.default is not PydanticUndefined else None
        value = field.get_default(call_default_factory=True) if field.default_factory and not inner else value
        default = "none" if value is None else _yaml(value)
    choices = tuple(str(choice) for choice in _choices(field.annotation))
    return Key(name, field.description or "", default, choices, inner is not None)


def _choices(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
        return
    for inner in typing.get_args(annotation):
        yield from _choices(inner)


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)

"""Arguments of a wrong type, refused by what the options' types say, before a workflow meets them. Loads no torch."""

from __future__ import annotations

import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from libreflux.errors import OptionError
from libreflux.recipe import Recipe

_TOLD = {
    str: "a text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    Sequence: "a list",
    Mapping: "a mapping",
    Recipe: "a recipe",
    Callable: "a function",
}
"""A type to what an error calls it; values of other types are not checked here."""
_TEXT_KINDS = {str, Path}


def check_types(options: object) -> None:
    """Refuses a value that is of none of the types that its field has.

    Args:
        options: a dataclass. What is typed as a list may be one element alone, and a text may be a path, as it names a
            model. Any number will do for a number: its range, and whether it is whole, is for whoever uses it.

    Raises:
        OptionError: names the types.
    """
    hints = _hints(type(options))
    for name, value in vars(options).items():
        kinds = _kinds(hints[name])
        texts_are_paths = Path in kinds
        if kinds and not any(_fits(value, Path if kind is str and texts_are_paths else kind) for kind in kinds):
            raise OptionError(f"cannot be {value!r}", name, hint=f"give {_either(kinds)}")
        for inner in (_kinds(typing.get_args(kind)[0]) for kind in kinds if _name(kind) is Sequence):
            wrong = [one for one in _texts(value, inner) if not isinstance(one, str | os.PathLike)]
            if wrong:
                raise OptionError(f"cannot be {wrong[0]!r}", name, hint=f"give {_either(inner)}")


def path_fields(options: type[Any]) -> set[str]:
    """The fields that take one path, or none."""
    found = {name: set(map(_name, _kinds(hint))) - {types.NoneType} for name, hint in _hints(options).items()}
    return {name for name, kinds in found.items() if kinds == _TEXT_KINDS}


def check_path(value: Any, name: str) -> Path:
    """The path, its home written out.

    Raises:
        OptionError: it is none.
    """
    if not _fits(value, Path) or not os.fspath(value):
        raise OptionError(f"cannot be {value!r}", name, hint="give a path")
    return Path(os.path.expanduser(value))


def _hints(options: type[Any]) -> Mapping[str, Any]:
    """The types of its fields; `object` in place of what is imported for type checkers alone."""
    names: dict[str, Any] = {}
    for kind in reversed(options.__mro__):
        names |= vars(sys.modules[kind.__module__])
    while True:
        try:
            return typing.get_type_hints(options, names)
        except NameError as error:
            names[str(error.name)] = object


def _kinds(hint: Any) -> Collection[Any]:
    """The types that a hint joins by `or`; none where one of them is not checked here."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        joined = [_kinds(one) for one in typing.get_args(hint)]
        return [kind for kinds in joined for kind in kinds] if all(joined) else ()
    known = hint is types.NoneType or _name(hint) in _TOLD
    return (hint,) if known else ()


def _name(kind: Any) -> Any:
    """The row of `_TOLD` that tells of a type."""
    origin = typing.get_origin(kind) or kind
    return Callable if getattr(origin, "_is_protocol", False) else origin


def _told(kind: Any) -> str:
    """What an error calls a type."""
    name = _name(kind)
    if name is not Sequence:
        return _TOLD[name]
    inner = set(map(_name, _kinds(typing.get_args(kind)[0])))
    return f"a list of {'paths' if Path in inner else 'texts' if inner == {str} else 'numbers'}"


def _either(kinds: Collection[Any]) -> str:
    """Types as an error joins them."""
    told = list(dict.fromkeys(_told(kind) for kind in kinds if kind is not types.NoneType))
    told += ["None"] if types.NoneType in kinds else []
    return " or ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)


def _fits(value: Any, kind: Any) -> bool:
    name = _name(kind)
    if name is Sequence:
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Recipe)
        return several or any(_fits(value, one) for one in _kinds(typing.get_args(kind)[0]))
    if name is Callable:
        return callable(value)
    if name is str:
        return isinstance(value, str)
    if name is Path:
        return isinstance(value, str | os.PathLike) and _may_be_a_path(value)
    if name in (int, float):
        single = getattr(value, "ndim", None) == 0  # of torch or numpy
        return isinstance(value, numbers.Real) or single
    return isinstance(value, name)


def _may_be_a_path(value: str | os.PathLike[str]) -> bool:
    """Whether a file system can be asked for it."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _texts(value: Any, kinds: Collection[Any]) -> Sequence[Any]:
    """The elements of what is to be a list of texts or paths; none of what looking would use up."""
    texts = set(map(_name, kinds)) <= _TEXT_KINDS
    return value if texts and isinstance(value, list | tuple) else ()

"""Whether an option is of the kind that its annotation says. Ranges and words are for each workflow to check."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath

from libreflux.errors import OptionError


def _is_path(value: object) -> bool:
    """Whether it names a file that a file system can be asked for."""
    try:
        return isinstance(value, str | PurePath) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "Path": (_is_path, "a path"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "float": (lambda value: isinstance(value, numbers.Real), "a number"),
    "int": (lambda value: isinstance(value, numbers.Real), "a whole number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "Callable": (callable, "a function"),
    "Progress": (callable, "a function"),
    "None": (lambda value: value is None, ""),
}
"""A name in an annotation to what is of that kind, and to its name in a hint."""
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


def check_kind(name: str, annotation: str, value: object) -> None:
    """Refuses a value of another kind than its annotation; one annotated with a class of ours is not looked at.

    Where a list is taken, a single value, None and paths pass.

    Args:
        name: the option.
        annotation: as it stands in the dataclass, e.g. "str | Sequence[str] | None".
        value: what was given; no iterator.

    Raises:
        OptionError: it is of none of the kinds, or a path that no file can have.
    """
    inside = _BRACKETS.search(annotation) if "Sequence[" in annotation else None
    of_each = _names(inside[1]) if inside else set()
    kinds = _names(_BRACKETS.sub("", _BRACKETS.sub("", annotation))) - {"Sequence"} | of_each
    if not kinds <= _KINDS.keys() or (of_each and value is None):
        return
    if "Path" in kinds:
        kinds.discard("str")
    several = of_each and isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    for one in value if several and isinstance(value, Iterable) else [value]:
        if not any(_KINDS[kind][0](one) for kind in kinds) and not (of_each and isinstance(one, PurePath)):
            words = next(word for kind, (_, word) in _KINDS.items() if kind in kinds)
            raise OptionError(f"cannot be {one!r}", name, hint=f"give {words}")


def _names(annotation: str) -> set[str]:
    return {part.strip() for part in annotation.split("|")} - {""}

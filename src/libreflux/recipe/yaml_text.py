"""YAML as recipes need it, and dotted overrides over a tree of plain values; knows no recipe. No torch here.

A value is what it looks like: 1e-4 is a number and 010 is ten, as in YAML 1.2; a date or 1:30 is text; tags (`!!set`)
are refused, and so is a key that is given twice.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import yaml

from libreflux.errors import RecipeError


def parse(text: str) -> Any:
    """Plain values from YAML; a yaml.YAMLError on bad YAML, a key given twice, a key that is not text, or a tag."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, OverflowError) as error:  # PyYAML's own, of 5,000 digits or "\\UFFFFFFFF"
        raise yaml.YAMLError(str(error)) from None


def said(error: yaml.YAMLError) -> str:
    """What is wrong with the YAML and in which line, without the excerpt that PyYAML adds."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else error.problem
    return str(error)


def dump(value: Any) -> str:
    """YAML that ``parse`` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def scalar(text: str) -> str:
    """A text as YAML that ``parse`` reads back to it; quoted only when it must be."""
    try:
        plain = parse(text) == text
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def override(tree: dict[str, Any], text: str) -> None:
    """Lays one ``a.b.0.c=value`` over ``tree`` in place; the value is YAML, list items go by number, the next appends.

    Raises:
        RecipeError: not of this form, or a path through something that has no keys.
    """
    key, equals, written = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError("not an override", where=text, hint="write key=value, e.g. optimizer.learning_rate=1e-4")
    if not written.strip():  # to YAML null, which many keys take for "not given"
        hint = "give it a value, null for none; is a variable not set?"
        raise RecipeError("is empty", where=text, hint=hint)
    if " #" in written and written.lstrip()[:1] not in ("'", '"', "[", "{"):
        raise RecipeError("` #` begins a comment in YAML", where=text, hint="quote the value")
    try:
        value = parse(written)
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {said(error)}", where=text, hint="quote the value") from None
    parts = key.strip().split(".")
    node: Any = tree
    for part, following in itertools.pairwise(parts):
        node = _below(node, part, [] if _is_number(following) else {}, text)
    if isinstance(node, list):
        index = _index(node, parts[-1], text)
        node[index:] = [value, *node[index + 1 :]]
    else:
        node[parts[-1]] = value


def _below(node: Any, part: str, empty: Any, text: str) -> Any:
    """The mapping or list under one part of a path, made if need be; copied, since an alias (`*a`) shares it."""
    place: Any = _index(node, part, text) if isinstance(node, list) else part
    if isinstance(node, list):
        node[place:] = node[place:] or [None]
    known = node[place] if isinstance(node, list) else node.get(place)
    node[place] = below = empty if known is None else copy.copy(known)
    if not isinstance(below, dict | list):
        raise RecipeError(f"{part} is a value, it has no keys", where=text, hint="shorten the key")
    return below


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10


def _index(items: list[Any], part: str, text: str) -> int:
    if not _is_number(part) or int(part) > len(items):
        raise RecipeError(
            f"{part!r} is no item of a list of {len(items)}", where=text, hint="number items from 0; the next appends"
        )
    return int(part)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for numbers and dates, with tags and a key given twice errors."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            raise yaml.constructor.ConstructorError(None, None, f"tag {tag!r} in a recipe", event.start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        if id(node) not in self._checked:  # later it also holds what `<<` merged into it
            self._checked.add(id(node))
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: Any) -> None:
        seen: set[str] = set()
        for key_node, _ in node.value:
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)

    def construct_text(self, node: Any) -> str:
        """JSON writes an emoji as two halves, \\ud83d\\ude00; one alone is no text, nor is a NUL."""
        try:
            text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            problem = "a text with a character that is none"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return str(text)


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader would read as a number, or with a line end of Unicode's in it."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None  # unquoted, PyYAML folds them
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+)$")
_REAL = re.compile(
    r"(?:[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [row for row in rows if row[0] not in {_TAG + kind for kind in ("int", "float", "timestamp", "value")}]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_TAG + "str", _Loader.construct_text)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_TAG + "int", _WHOLE, list("-+0123456789"))
    _kind.add_implicit_resolver(_TAG + "float", _REAL, list("-+.0123456789"))

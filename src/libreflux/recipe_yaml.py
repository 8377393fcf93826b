"""YAML as recipes need it, and dotted overrides over a tree of plain values; knows no recipe. No torch here."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import yaml

from libreflux.errors import RecipeError


def parse(text: str) -> Any:
    """Plain values from YAML; a yaml.YAMLError on bad YAML, a key given twice or a key that is not text."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


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
        raise RecipeError("not an override", where=text, mend="write key=value, e.g. optimizer.learning_rate=1e-4")
    if " #" in written and written.lstrip()[:1] not in ("'", '"', "[", "{"):
        raise RecipeError("` #` begins a comment in YAML", where=text, mend="quote the value")
    try:
        value = parse(written)
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=text, mend="quote the value") from None
    parts = key.strip().split(".")
    node: Any = tree
    for part, following in itertools.pairwise(parts):
        empty: Any = [] if following.isdigit() else {}
        if isinstance(node, list):
            index = _index(node, part, text)
            if index == len(node):
                node.append(empty)
            node = node[index]
        else:
            if node.get(part) is None:
                node[part] = empty
            node = node[part]
        if not isinstance(node, dict | list):
            raise RecipeError(f"{part} is a value, it has no keys", where=text, mend="shorten the key")
    if isinstance(node, list):
        index = _index(node, parts[-1], text)
        node[index:] = [value, *node[index + 1 :]]
    else:
        node[parts[-1]] = value


def _index(items: list[Any], part: str, text: str) -> int:
    if not part.isdigit() or int(part) > len(items):
        raise RecipeError(
            f"{part!r} is no item of a list of {len(items)}", where=text, mend="number items from 0; the next appends"
        )
    return int(part)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with 1e-4 a number, as in YAML 1.2, and a key given twice an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader would read as a number, or with a line end of Unicode's in it."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None  # unquoted, PyYAML folds them
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))

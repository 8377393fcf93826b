"""The reference: public names, verbs and recipe keys, written at each build from the code itself.

A page has `<!-- generated: NAME -->` where the text goes. Nothing of it is stored, so nothing of it can be out of date.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from typer.main import get_command

import libreflux
from libreflux import errors
from libreflux.cli.app import app as command_line
from libreflux.cli.verb import every_verb
from libreflux.recipe import Recipe

MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def python_api() -> Iterator[str]:
    """Each public name of the package, by its docstring."""
    for name in sorted(libreflux.__all__, key=str.lower):
        if name.startswith("_"):
            continue
        found = getattr(libreflux, name)
        if not callable(found):
            raise TypeError(f"libreflux.{name} is neither a function nor a class: {found!r}")
        yield f"## {name}\n"
        kind = "class" if inspect.isclass(found) else "function"
        signature = "(**keys)" if hasattr(found, "model_fields") else ""  # a pydantic model: its keys have a page
        yield _autodoc(kind, f"libreflux.{name}{signature}")


CLASSES = (
    "libreflux.model.source.ModelSource",
    "libreflux.model.facts.Facts",
    "libreflux.adapter.io.AdapterFile",
    "libreflux.sample.metadata.GenerationRecord",
    "libreflux.workflows.generate.GeneratedPicture",
    "libreflux.workflows.train_events.TrainEvents",
    "libreflux.training.callbacks.StepInfo",
    "libreflux.workflows.progress.Progress",
)
"""What the public functions take and return, besides their own results, whose fields stand with each function."""


def python_classes() -> Iterator[str]:
    """Each class that a caller meets, by its docstring."""
    for name in CLASSES:
        yield f"### {name.rpartition('.')[2]}\n"
        yield _autodoc("class", name)


def python_errors() -> Iterator[str]:
    """Each kind of error that a caller can meet."""
    for name, found in vars(errors).items():
        if inspect.isclass(found) and issubclass(found, Exception) and found.__module__ == errors.__name__:
            yield _autodoc("exception", f"{errors.__name__}.{name}")


def _autodoc(kind: str, name: str) -> str:
    members = (
        "   :members:\n   :exclude-members: model_config\n   :special-members: __call__\n" if kind == "class" else ""
    )
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n{members}```\n"


def verbs() -> Iterator[str]:
    """Each verb's usage, arguments and options, as `--help` has them."""
    group: Any = get_command(command_line)
    for name, command in every_verb(group).items():
        context = command.make_context(f"libreflux {name}", [], resilient_parsing=True)
        yield f"## libreflux {name}\n\n{_paragraphs(command.help)}\n"
        yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
        group_of_options = None
        for param in command.params:
            record = param.get_help_record(context)
            if record is None:
                continue
            if getattr(param, "rich_help_panel", None) not in (None, group_of_options):
                group_of_options = param.rich_help_panel
                yield f"**{_prose(group_of_options)}**\n"
            yield f"`{record[0]}`\n: {_prose(record[1]) or 'No further words.'}\n"


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(_prose(one) for one in inspect.cleandoc(text or "").split("\n\n"))


def _prose(text: str) -> str:
    """Plain text as Markdown that shows it as it is."""
    return re.sub(r"([\\*_`<>\[\]|#$~])", r"\\\1", " ".join(text.split()))


def recipe_keys() -> Iterator[str]:
    """Each key of a recipe: its description, its values and its default, section by section."""
    yield "## The top level\n"
    yield from _keys(Recipe, "")
    for name, field in Recipe.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            continue
        many = _is_list(field.annotation)
        yield f"## {name}\n"
        yield f"{_prose(section.__doc__ or '')}{' A list: each item has these keys.' if many else ''}\n"
        yield from _keys(section, f"{name}.0." if many else f"{name}.")


def _keys(section: Any, prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield f"`{key}`\n: {_prose(field.description or '')}.\\\n  {_values(field)}\n"
        inner = _section(field.annotation) if prefix else None
        if inner is not None:
            yield from _keys(inner, f"{key}.0." if _is_list(field.annotation) else f"{key}.")


def _values(field: FieldInfo) -> str:
    told = [_kind(field.annotation), *_bounds(field.metadata)]
    default = field.get_default(call_default_factory=False)
    if field.is_required():
        told.append("must be given")
    elif _section(field.annotation) is None and default is not PydanticUndefined and default is not None:
        told.append(f"default `{_plain(default)}`")
    return "*" + "; ".join(told) + "*"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value) if value != "" else '""'


MISTAKE = 10**9
"""A bound from here on only catches slips of the pen, and is not shown."""
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for one in metadata:
        for name, word in _BOUNDS.items():
            bound = getattr(one, name, None)
            if bound is not None and bound < MISTAKE:
                yield f"{word} {bound:g}"


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _kind(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return ", ".join([_kind(inner[0]), *_bounds(_flat(inner[1:]))])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _kind(one) for one in inner)
    if origin in (list, tuple):
        if Ellipsis not in inner and len(inner) > 1:
            return f"a list of {len(inner)} numbers"
        return f"a list of: {_kind(inner[0])}"
    if origin is dict:
        return "names with numbers"
    return _KINDS.get(kind, "a section")


def _flat(metadata: typing.Iterable[Any]) -> list[Any]:
    """Bounds as pydantic's fields hold them: each apart."""
    return [one for given in metadata for one in (given.metadata if isinstance(given, FieldInfo) else [given])]


def _is_list(kind: Any) -> bool:
    return any(typing.get_origin(one) in (list, tuple) for one in (kind, *typing.get_args(kind)))


def _section(kind: Any) -> Any:
    """The section of the recipe that a type holds, itself or as a list's item; None for plain values."""
    if inspect.isclass(kind) and hasattr(kind, "model_fields"):
        return kind
    return next((found for one in typing.get_args(kind) if (found := _section(one)) is not None), None)


WRITERS: dict[str, Callable[[], Iterator[str]]] = {
    "python-api": python_api,
    "python-classes": python_classes,
    "python-errors": python_errors,
    "verbs": verbs,
    "recipe-keys": recipe_keys,
}


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = MARK.sub(lambda found: "\n".join(WRITERS[found[1]]()), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

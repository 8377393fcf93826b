"""A workflow takes one dataclass of options; Python callers give its fields as keywords."""

from __future__ import annotations

import functools
import inspect
import os
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from libreflux.errors import OptionError
from libreflux.values import plain_number
from libreflux.workflows.argument_types import check_types, path_fields

TEXTS = {"prompts", "prompt_2", "negative", "negative_2"}
"""Options that may be empty: an empty text is one too."""
MODELS = {"model", "what", "base", "against", "reference"}
"""Options that name a model: a path of one is a name too."""
P = ParamSpec("P")
OptionsT = TypeVar("OptionsT")
Result = TypeVar("Result")


def by_keywords(options: Callable[P, OptionsT], workflow: Callable[[OptionsT], Result]) -> Callable[P, Result]:
    """The workflow as a function of its options' fields, with their names, types and defaults.

    Args:
        options: the dataclass.
        workflow: takes one of them.
    """

    @functools.wraps(workflow)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        made = options(*args, **kwargs)
        for name, value in list(vars(made).items()):
            if isinstance(value, str) and value == "" and name not in TEXTS:
                raise OptionError("is empty", name, hint="give it a value, or leave it out")
            value = _plain(str(value) if isinstance(value, Path) and name in MODELS else plain_number(value))
            value = str(value) if name == "device" and type(value).__module__ == "torch" else value
            object.__setattr__(made, name, value)
        check_types(made)
        for name in path_fields(type(made)) - MODELS:
            if (path := getattr(made, name)) is not None:
                object.__setattr__(made, name, Path(os.path.expanduser(path)))
        return workflow(made)

    call.__name__ = call.__qualname__ = workflow.__name__.removesuffix("_with")
    result = typing.get_type_hints(workflow)["return"]
    call.__signature__ = inspect.signature(options).replace(return_annotation=result)  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(workflow)}\n\n{_arguments(options)}\n\n{_returned(result)}"
    del call.__wrapped__
    return call


def _plain(value: Any) -> Any:
    """An array as a list, an iterator as a tuple: both may be read twice."""
    if getattr(value, "ndim", 0):
        return value.tolist()
    return tuple(value) if isinstance(value, Iterator) else value


def _arguments(options: object) -> str:
    """What the dataclass of options says of its fields, as arguments."""
    return f"Args:\n{textwrap.indent(_fields(options), '    ')}"


def _returned(result: type) -> str:
    """What the dataclass of the result says of itself, and of its fields as a list."""
    summary = (inspect.getdoc(result) or "").partition("\n")[0].rstrip(".")
    rows = re.sub(r"^(\w+):", r"* ``\1``:", _fields(result), flags=re.MULTILINE)
    text = f"{result.__name__}: {summary[:1].lower()}{summary[1:]}.\n\n{rows}"
    return f"Returns:\n{textwrap.indent(text, '    ')}"


def _fields(kind: object) -> str:
    """The rows of `Attributes:` in the docstrings of a class and of those that it is made from."""
    made_from = [kind for kind in getattr(kind, "__mro__", (kind,)) if kind is not object]
    return "\n".join(filter(None, map(_own_fields, made_from)))


def _own_fields(kind: object) -> str:
    rows = textwrap.dedent(inspect.cleandoc(getattr(kind, "__doc__", "") or "").partition("Attributes:\n")[2])
    return rows.partition("\n\n")[0].rstrip()

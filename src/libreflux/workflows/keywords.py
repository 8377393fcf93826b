"""A workflow takes one dataclass of options; Python callers give its fields as keywords."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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
        return workflow(options(*args, **kwargs))

    call.__name__ = call.__qualname__ = workflow.__name__.removesuffix("_with")
    call.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(workflow)}\n\n{_fields(options)}"
    del call.__wrapped__
    return call


def _fields(options: object) -> str:
    """What the dataclass says of its fields, as arguments."""
    text = inspect.getdoc(options) or ""
    return "Args:" + text.partition("Attributes:")[2] if "Attributes:" in text else text

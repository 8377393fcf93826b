"""Types of the keys that a recipe may leave to the run: "auto", or what is said. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from libreflux.recipe.sections import Whole


def _flag(value: Any) -> Any:
    try:
        return value if value == "auto" else TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError(f"wanted true, false or auto, not {value!r}") from None


def _count(value: Any) -> Any:
    try:
        return value if value == "auto" else TypeAdapter(Annotated[Whole, Field(ge=0)]).validate_python(value)
    except ValidationError:
        raise ValueError(f"wanted a whole number from 0, or auto, not {value!r}") from None


def _word(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # which on and off are to YAML


FlagOrAuto = Annotated[bool | Literal["auto"], BeforeValidator(_flag)]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count)]
OnOffOrAuto = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]

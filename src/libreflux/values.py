"""Rules for values that several commands, recipes and calls take: numbers, sides of pictures in pixels, adapters."""

from __future__ import annotations

import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from libreflux.errors import AdapterError, OptionError

SIDE_STEP = 16
"""Pixels: 8 of the VAE, 2 of the packing."""
MOST_SIDE = 16384
"""Pixels per side of any picture."""
MOST_NUMBERS = 10_000
"""Of one list."""


def is_side(pixels: int) -> bool:
    """Whether a picture's side of so many pixels can be drawn: a multiple of 16."""
    return pixels >= SIDE_STEP and pixels % SIDE_STEP == 0


def check_side(pixels: int | None, where: str) -> None:
    """Refuses a side that is no multiple of 16; None is not checked.

    Raises:
        OptionError: names the nearest one.
    """
    if pixels is not None and not is_side(pixels):
        nearest = max(SIDE_STEP, round(pixels / SIDE_STEP) * SIDE_STEP)
        raise OptionError(f"{pixels} is not a multiple of {SIDE_STEP}", where, hint=f"use {nearest}")


def is_whole(value: object) -> bool:
    """Whether it is one whole number, Python's or numpy's, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def plain_number(value: Any) -> Any:
    """numpy's and torch's numbers as Python's, which JSON and records hold; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def listed_numbers(value: object, where: str, *, whole: bool = False, distinct: bool = True) -> tuple[Any, ...] | None:
    """Numbers as a Python caller gives them: one, several, or a text as `number_list` reads it; None stays None.

    Args:
        value: what was given; of one and of several each is checked by who uses it.
        where: the option, for errors.
        whole, distinct: of a text, see `number_list`; whole ones become int.

    Raises:
        OptionError: none of these.
    """
    if value is None:
        return None
    if isinstance(value, str):
        found = number_list(value, where, whole=whole, distinct=distinct)
        return tuple(map(int, found)) if whole else found
    if isinstance(value, numbers.Number):
        return (plain_number(value),)
    if not isinstance(value, Iterable):
        raise OptionError(f"cannot be {value!r}", where, hint="give a list of numbers")
    return tuple(map(plain_number, value))


def number_list(
    text: str, where: str, *, whole: bool = False, least: float = 0.0, most: float = math.inf, distinct: bool = True
) -> tuple[float, ...]:
    """The numbers of a text: single ones, "1,3.5", and ranges "FIRST:LAST" or "FIRST:LAST:STEP", LAST included.

    Args:
        text: as the user wrote it.
        where: the option or key, for errors.
        whole: whether only whole numbers are taken.
        least, most: the smallest and the largest number.
        distinct: whether a number that is there twice is refused.

    Raises:
        OptionError: no such list, a number out of range, or one that is there twice.
    """
    found: list[float] = []
    for part in text.split(","):
        try:
            first, *rest = (float(each) for each in part.split(":"))
            if not rest:
                found.append(first)
                continue
            last, step = rest[0], rest[1] if len(rest) > 1 else 1.0
            count = math.floor((last - first) / step + 1e-9) + 1
            if len(rest) > 2 or step <= 0 or not 1 <= count <= MOST_NUMBERS:
                raise ValueError
        except (ValueError, OverflowError, ZeroDivisionError):
            hint = "write 4,28 or 1:6" if whole else "write 1,3.5 or 1:6:1"
            raise OptionError(f"{text!r} is no list of numbers", where, hint=hint) from None
        found += [round(first + index * step, 9) for index in range(count)]
    for value in found:
        if not (math.isfinite(value) and least <= value <= most and (not whole or value.is_integer())):
            hint = f"use {'whole ' if whole else ''}numbers from {least:g}{f' to {most:g}' if most < math.inf else ''}"
            raise OptionError(f"cannot be {value:g}", where, hint=hint)
    twice = [value for value, count in Counter(found).items() if count > 1]
    if distinct and twice:
        raise OptionError(f"{text!r} has {twice[0]:g} twice", where, hint="remove one of them")
    return tuple(found)


def adapter_argument(text: str) -> tuple[str, float]:
    """`PATH` or `PATH:weight`: the path and its weight, 1 when none is given.

    Raises:
        AdapterError: the weight is no finite number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or weight.endswith(".safetensors") or re.search(r"[/\\]", weight):  # C:\run is a folder of Windows
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise AdapterError(f"{weight!r} is no weight", where=text, hint="write FILE.safetensors:0.8")
    return path, value


def is_guided(scale: float) -> bool:
    """Whether a guidance scale asks for the other velocity too: 0 and 1 are no guidance, the prompt's velocity alone.

    Between them v_u + g (v_c − v_u) is a mean of both, which weakens the prompt.
    """
    return scale not in (0, 1)

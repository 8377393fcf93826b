"""Which values the arguments of a drawing may have."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict, cast

from libreflux.errors import OptionError
from libreflux.model.facts import MOST_STEPS
from libreflux.values import MOST_SIDE, is_side

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GUIDANCE_RULES = ("cfg", "apg", "cfg-zero")
MOST_PIXELS = 2**26
"""Of one picture: 8192 x 8192, 262,144 tokens. A picture's own record, too, may name no more."""


class Arguments(TypedDict, total=False):
    """Arguments of `LibreFluxPipeline.__call__` that `check_values` knows, by their names there."""

    height: int | None
    width: int | None
    num_inference_steps: int | None
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    embedded_guidance: float | None
    no_cfg_until: int
    guidance_start: float
    guidance_stop: float
    guidance_rescale: float
    batch_cfg: bool | str
    num_images_per_prompt: int
    output_type: str
    tile: bool | None
    return_dict: bool
    max_sequence_length: int | None
    guidance_rule: str
    apg_eta: float | None
    apg_radius: float | None
    apg_momentum: float | None
    zero_init: int
    nag: float
    nag_tau: float | None
    nag_alpha: float | None


def check_values(given: Arguments, names: Mapping[str, str] | None = None) -> None:
    """Raises OptionError for a value out of range; None is not checked.

    Args:
        given: what a user said, of these types or not.
        names: what the user calls them, if otherwise.
    """
    for name, value in given.items():
        good, hint = _CHECKS[name]
        if value is not None and not good(value):
            raise OptionError(f"cannot be {value!r}", (names or {}).get(name, name), hint=hint)
    width, height = given.get("width"), given.get("height")
    if width and height and width * height > MOST_PIXELS:
        what = f"{width} x {height} pixels are more than {MOST_PIXELS / 1e6:.0f} million"
        raise OptionError(what, (names or {}).get("width", "width"), hint="draw a smaller picture")
    start, stop = given.get("guidance_start", 0.0), given.get("guidance_stop", 1.0)
    if start >= stop:
        name = (names or {}).get("guidance_start", "guidance_start")
        raise OptionError(f"{start:g} is not below the stop, {stop:g}", name, hint="start before the stop")


def first_steps_argument(text: str) -> tuple[str, int]:
    """`MODEL` or `MODEL:N`: the model, and how many first steps it draws, 1 where none is given."""
    model, colon, number = text.rpartition(":")
    is_number = bool(colon and model) and number.isascii() and number.isdigit()
    return (model, int(number)) if is_number else (text, 1)


def _is_number(value: Any) -> bool:
    """Whether it is one number, Python's, numpy's or torch's: no text, and no truth value."""
    if isinstance(value, bool | str | bytes):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _is_whole(value: Any) -> bool:
    if not _is_number(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_size(value: Any) -> bool:
    return _is_whole(value) and value <= MOST_SIDE and is_side(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_scale(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda value: _is_whole(value) and value >= least


def _falls(sigmas: Any) -> bool:
    values = [float(sigma) if _is_number(sigma) else math.nan for sigma in sigmas]
    return 0 < len(values) <= MOST_STEPS and all(0 < v <= 1 for v in values) and all(a > b for a, b in pairwise(values))


def _is_switch(value: Any) -> bool:
    return value is True or value is False


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "height": (_is_size, f"use a multiple of 16, at most {MOST_SIDE}"),
    "width": (_is_size, f"use a multiple of 16, at most {MOST_SIDE}"),
    "num_inference_steps": (lambda steps: _is_whole(steps) and 1 <= steps <= MOST_STEPS, f"use 1 to {MOST_STEPS}"),
    "sigmas": (_falls, "use falling numbers in (0, 1]; the last one, 0, is added"),
    "guidance_scale": (_is_scale, "use 0 or more; 0 and 1 are no guidance"),
    "embedded_guidance": (_is_scale, "use 0 or more"),
    "no_cfg_until": (_is_count(0), "use 0 or more steps"),
    "guidance_start": (_is_fraction, "use a fraction of the steps, 0 to 1"),
    "guidance_stop": (_is_fraction, "use a fraction of the steps, 0 to 1"),
    "guidance_rescale": (_is_fraction, "use 0 to 1; 0 is none"),
    "batch_cfg": (lambda how: _is_switch(how) or how == "auto", 'use True, False or "auto"'),
    "num_images_per_prompt": (_is_count(1), "use 1 or more"),
    "output_type": (OUTPUT_TYPES.__contains__, f"use one of {', '.join(OUTPUT_TYPES)}"),
    "tile": (_is_switch, "use True, False or None"),
    "return_dict": (_is_switch, "use True or False"),
    "max_sequence_length": (_is_count(0), "use a count of tokens"),
    "guidance_rule": (GUIDANCE_RULES.__contains__, f"use one of {', '.join(GUIDANCE_RULES)}"),
    "apg_eta": (_is_finite, "use a number; 0 takes the parallel part out, 1 leaves it"),
    "apg_radius": (lambda radius: _is_scale(radius) and radius > 0, "use a number above 0, or leave it out"),
    "apg_momentum": (lambda m: _is_number(m) and -1 < m < 1, "use a number between -1 and 1; 0 is none"),
    "zero_init": (_is_count(0), "use 0 or more steps"),
    "nag": (_is_scale, "use 0 or more; 0 is none, 4 is usual"),
    "nag_tau": (lambda tau: _is_finite(tau) and tau >= 1, "use 1 or more"),
    "nag_alpha": (_is_fraction, "use 0 to 1; 0 is no guidance"),
}


def arguments_of(request: object) -> Arguments:
    """All that an object has as attributes, but for what is checked where it is made."""
    names = (name for name in _CHECKS if hasattr(request, name) and name not in ("guidance_rule", "nag"))
    return cast(Arguments, {name: getattr(request, name) for name in names})

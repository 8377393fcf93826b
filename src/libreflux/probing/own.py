"""A measure of one's own: a function of pictures and prompts that a probe measures as it does its own measures."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor

from libreflux.errors import DataError, LibrefluxError
from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.metrics.bootstrap import mean, measured, share
from libreflux.probing.report.labels import MEANINGS
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import Plan, Section, SectionResult, prompted
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt
from libreflux.probing.units import Over
from libreflux.result_key import digest

OfPictures = Callable[[np.ndarray, Sequence[str]], "Sequence[float] | np.ndarray"]
"""of(pictures uint8 [N, H, W, 3], their N prompts) → N numbers; NaN where it says nothing of a picture."""
HELD_OUT = "held_out_"
FORMULA = 1
"""Raised when the same function comes to be measured in another way."""


@dataclass(frozen=True, kw_only=True)
class OwnMeasure:
    """What `probe` measures beside its own: of the drawn pictures by guidance and by steps, and of the held-out ones.

    Attributes:
        name: in tables and files, as "sharpness"; the held-out pictures' is "held_out_sharpness".
        of: pictures uint8 [N, H, W, 3] and their N prompts to N numbers, one of each; NaN says nothing of a picture.
        meaning: one line for a reader of the page.
        unit: of the numbers.
        is_share: the numbers are 1 for yes and 0 for no: the interval is Wilson's, else a bootstrap's.
        reference: what a free model has by theory; None where there is no theory.
        version: raise it when the numbers change though the function's file does not: for what the function reads.

    Raises:
        DataError: a name that is taken, or is none.
    """

    name: str
    of: OfPictures
    meaning: str = ""
    unit: str = ""
    is_share: bool = False
    reference: float | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name.startswith(HELD_OUT):
            hint = f"use small letters, digits and _, and not {HELD_OUT}… in front"
            raise DataError("is no name for a measure", where=self.name, hint=hint)
        if self.name in MEANINGS:
            raise DataError("is a measure of every probe", where=self.name, hint="give yours another name")

    @property
    def digest(self) -> str:
        """Of its version, the file that holds its function, and plain values that the function holds.

        Kept numbers of another one are not used.
        """
        return digest([FORMULA, self.version, self.unit, self.is_share, self.reference, _code(self.of)])

    @property
    def row(self) -> tuple[str, str, str]:
        """As `Settings.measures` keeps it."""
        return self.name, self.digest, self.meaning

    def section(self) -> Section:
        """Of a probe."""
        return Section(f"own-{self.name}", 1, _plan, self._measure, code=self.digest, drawn=True)

    def _measure(self, context: ProbeContext) -> SectionResult:
        settings, prompts, rows = context.settings, context.prompts, list[Measure]()
        texts = [one.text for one in prompts]
        for at, batch in _batches(settings, prompts):
            values = self._values(context, [*context.drawn(batch).latents], texts)
            rows += self._rows(context, self.name, at, values, texts, "prompts")
        parts = [*context.held_out.batches(settings.batch)]
        captions = [caption for part in parts for caption in part.captions]
        values = self._values(context, [row for part in parts for row in part.latents], captions)
        rows += self._rows(context, f"{HELD_OUT}{self.name}", {}, values, captions, "pictures")
        return SectionResult(rows)

    def _values(self, context: ProbeContext, latents: Sequence[Tensor], texts: Sequence[str]) -> np.ndarray:
        pictures = np.stack([context.picture(one) for one in latents])
        try:
            found = np.asarray(self.of(pictures, list(texts)), np.float64)
        except LibrefluxError:
            raise
        except (Exception, SystemExit) as error:  # the caller's own code: whatever it raises
            told = f"its function failed ({type(error).__name__}: {error})".splitlines()[0]
            raise DataError(told, where=self.name, hint="mend the function, and run the same again") from error
        if found.shape != (len(texts),):
            told = f"its function gave {_shape(found)} for {len(texts)} pictures"
            raise DataError(told, where=self.name, hint="give one number for each picture")
        if np.isinf(found).any():
            hint = "give NaN where it says nothing of a picture"
            raise DataError("its function gave an infinite number", where=self.name, hint=hint)
        return found

    def _rows(
        self,
        context: ProbeContext,
        name: str,
        at: Mapping[str, Coordinate],
        values: np.ndarray,
        texts: Sequence[str],
        over: Over,
    ) -> list[Measure]:
        asked = values[np.isfinite(values)]
        if self.is_share and not np.isin(asked, (0.0, 1.0)).all():
            raise DataError("is a share, and a number is neither 0 nor 1", where=self.name, hint="take is_share away")
        return measured(
            name,
            at,
            (share if self.is_share else mean)(values),
            len(values),
            context.groups(texts),
            seed=context.settings.seed,
            unit=self.unit,
            reference=None if name.startswith(HELD_OUT) else self.reference,
            over=over,
        )


def _batches(
    settings: Settings, prompts: Sequence[ParsedPrompt]
) -> list[tuple[Mapping[str, Coordinate], PictureBatch]]:
    """The pictures that other sections draw too."""
    own = settings.own_guidance
    found: list[tuple[Mapping[str, Coordinate], PictureBatch]] = [
        ({"guidance": scale}, prompted(settings, prompts, scale, settings.draw_steps)) for scale in settings.guidance
    ]
    return found + [
        ({"steps": steps, "guidance": own}, prompted(settings, prompts, own, steps)) for steps in settings.steps
    ]


def _plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    return Plan([batch for _, batch in _batches(settings, prompts)])


def _code(of: Any) -> str:
    """SHA-256 of a function's file, or of its byte code where no file is found; with the plain values that it holds."""
    if isinstance(of, functools.partial):
        return digest([_code(of.func), repr(of.args), repr(sorted(of.keywords.items()))])
    function = inspect.unwrap(of)
    if isinstance(function, MethodType):
        return digest([_code(function.__func__), repr(getattr(function.__self__, "__dict__", None))])
    if not isinstance(function, FunctionType):
        called = type(function).__call__
        inside = _code(called) if isinstance(called, FunctionType) else repr(function)
        return digest([inside, repr(getattr(function, "__dict__", None))])
    try:
        file = inspect.getsourcefile(function)
        code = "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (TypeError, OSError):
        code = ""
    held, code = _held(function), code or digest(_byte_code(function.__code__))
    return digest([code, held]) if held else code


def _held(function: FunctionType) -> list[str]:
    """Numbers, texts and tuples among a function's defaults and in what it encloses."""
    cells = list[object]()
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that has no value yet
            cells.append(cell.cell_contents)
    values = [*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items()), *cells]
    return [repr(one) for one in values if isinstance(one, bool | int | float | str | tuple)]


def _byte_code(code: CodeType) -> list[Any]:
    """Of a function that was typed at a prompt; its own functions are within."""
    constants = [_byte_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]


def _shape(found: np.ndarray) -> str:
    return f"an array of shape {list(found.shape)}" if found.ndim else "one number"

"""Every refusal that a user can meet: what was wrong, where, and the hint, on one line; exit code 2 (a card: 1)."""

from __future__ import annotations

import copyreg
import re
from collections.abc import Mapping
from typing import Any

from libreflux.printing import printable, shortened


def remade(error: Exception) -> tuple[Any, ...]:
    """The `__reduce__` of an exception whose constructor takes more than its message: it is copied without a call.

    So it crosses from a process to the one that started it, where pickle would otherwise call the constructor wrongly.
    """
    return copyreg.__newobj__, (type(error), *error.args), vars(error)  # type: ignore[attr-defined]


class LibrefluxError(Exception):
    """A user's mistake or a broken input, never a bug of ours.

    Args:
        what: what is wrong, a clause without a final stop.
        where: the file, key, layer or sample it was found in.
        hint: what to do about it.

    Attributes:
        code: the exit code of a command that it ends.
    """

    code = 2

    def __init__(self, what: str, *, where: object | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return remade(self)

    def __str__(self) -> str:
        line = f"{shortened(self.where)}: {shortened(self.what)}" if self.where is not None else shortened(self.what)
        if self.hint:
            line += f"; hint: {shortened(self.hint)}"
        return printable(" ".join(line.split()))


class RecipeError(LibrefluxError):
    """A recipe key or value."""


class OptionError(RecipeError):
    """A value of an option, of a call or of a command.

    In `what` and `hint` other options stand in backquotes, so that a command can show them as they are typed there.

    Args:
        what: what is wrong.
        option: its name in the call, e.g. "no_cfg_until"; several as "int8, program"; None where `what` names them.
        value: the one of its values that is meant, where that must be said.
        hint: what to do about it.
    """

    def __init__(self, what: str, option: str | None, *, value: object = None, hint: str | None = None) -> None:
        self.option, self.value = option, value
        super().__init__(what, where=option if value is None else f"{option} {value}", hint=hint)

    def spelled(self, names: Mapping[str, str]) -> RecipeError:
        """The same error with options as a command spells them.

        Args:
            names: option to its spelling there, e.g. "no_cfg_until" to "--no-cfg-until".
        """

        hint = None if self.hint is None else _spelled(self.hint, names)
        where = self.option and ", ".join(names.get(name, name) for name in self.option.split(", "))
        where = where if self.value is None else f"{where} {self.value}"
        return RecipeError(_spelled(self.what, names), where=where, hint=hint)


class OptionHint(str):
    """The hint of an error of another kind, with options in backquotes as in an `OptionError`."""

    __slots__ = ()

    def spelled(self, names: Mapping[str, str]) -> str:
        """The hint with options as a command spells them, see `OptionError.spelled`."""
        return _spelled(self, names)


def _spelled(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)


class DataError(LibrefluxError):
    """A picture, caption, folder or cache."""


class ModelError(LibrefluxError):
    """A model folder, its facts or its parts."""


class AdapterError(LibrefluxError):
    """An adapter file, pattern or target layer."""


class RunError(LibrefluxError):
    """A run folder: its lock, checkpoints or recipe."""


class DeviceError(LibrefluxError):
    """A card that failed: not the user's mistake, and nothing more can be computed on it in this process."""

    code = 1

"""Measures of the user's own, as they are named: an installed package's, a file's, or the object itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from libreflux.errors import LibrefluxError, OptionError
from libreflux.places import did_you_mean

if TYPE_CHECKING:
    from libreflux.probing.own import OwnMeasure

GROUP = "libreflux.measures"
"""The entry points of packages that have measures for `probe`."""
Measures: TypeAlias = Union[str, "OwnMeasure", Sequence[Union[str, "OwnMeasure"]]]
OPTION = "measures"
HINT = f"name an entry point of {GROUP} of an installed package, or FILE.py:NAME"


def own_measures(given: Measures) -> list[OwnMeasure]:
    """The measures that a user asks for, each once.

    Args:
        given: one or several, each an `OwnMeasure`, the name of an entry point, or "FILE.py:NAME".

    Raises:
        OptionError: none of that name, code that fails as it is read, or two of one name.
    """
    from libreflux.probing.own import OwnMeasure

    listed: Iterable[Any] = [given] if isinstance(given, str | OwnMeasure) else given
    found = [one if isinstance(one, OwnMeasure) else _named(one) for one in listed]
    names = [one.name for one in found]
    if double := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"two of them are called {double[0]!r}", OPTION, hint="name each once")
    return found


def _named(name: object) -> OwnMeasure:
    from libreflux.probing.own import OwnMeasure

    if not isinstance(name, str):
        raise OptionError(f"cannot be {name!r}", OPTION, hint=f"give an OwnMeasure, or {HINT}")
    file, colon, inside = name.rpartition(":")
    try:
        found = _of_file(Path(os.path.expanduser(file)), inside) if colon else _of_package(name)
    except LibrefluxError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises
        told = f"{name!r} cannot be read ({type(error).__name__}: {error})".splitlines()[0]
        raise OptionError(told, OPTION, hint="mend what it says") from error
    if not isinstance(found, OwnMeasure):
        told = f"{name!r} is no libreflux.probing.own.OwnMeasure but a {type(found).__name__}"
        raise OptionError(told, OPTION, hint=HINT)
    return found


def _of_file(file: Path, name: str) -> object:
    if not file.is_file():
        raise OptionError(f"no such file: {file}", OPTION, hint=did_you_mean(file, HINT))
    spec = importlib.util.spec_from_file_location(f"libreflux_measures_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise OptionError(f"{file} is no Python file", OPTION, hint=HINT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise OptionError(f"{file} has no {name!r}", OPTION, hint=HINT)
    return getattr(module, name)


def _of_package(name: str) -> object:
    found = {one.value: one for one in entry_points(group=GROUP, name=name)}
    if not found:
        known = sorted({one.name for one in entry_points(group=GROUP)})
        told = f"; installed: {', '.join(known)}" if known else ""
        raise OptionError(f"there is no {name!r}{told}", OPTION, hint=HINT)
    if len(found) > 1:
        raise OptionError(f"several packages have {name!r}: {', '.join(sorted(found))}", OPTION, hint="uninstall one")
    return next(iter(found.values())).load()

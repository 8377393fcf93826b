"""`libreflux.NAME` for every name that the package offers: callable, and hidden by none of its modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

import libreflux

NAMES = [name for name in libreflux.__all__ if name != "__version__"]

EVERY_MODULE = """\
import importlib, pkgutil, sys
import libreflux
for module in pkgutil.walk_packages(libreflux.__path__, "libreflux."):
    if not module.name.endswith("__main__"):  # it runs the command line
        importlib.import_module(module.name)
assert "libreflux.workflows.merge" in sys.modules and "libreflux.cli.app" in sys.modules
for name in sys.argv[1:]:
    assert f"libreflux.{name}" not in sys.modules, f"a module hides libreflux.{name}"
    assert callable(getattr(libreflux, name)), f"libreflux.{name} is a {type(getattr(libreflux, name)).__name__}"
    assert name in dir(libreflux)
"""


def test_no_module_hides_a_name() -> None:
    assert {"Recipe", "merge", "average", "probe", "export", "load_adapter", "open_model"} <= set(NAMES)
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE, *NAMES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_told(name: str) -> None:
    assert libreflux.__doc__ is not None
    assert f"libreflux.{name}" in libreflux.__doc__
    assert name in dir(libreflux)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'libreflux' has no attribute 'nothing'"):
        libreflux.nothing  # noqa: B018

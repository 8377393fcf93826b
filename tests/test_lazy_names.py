"""`libreflux.NAME` for every name that the package offers: callable, and hidden by none of its modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import libreflux

NAMES = [name for name in libreflux.__all__ if name != "__version__"]

REFUSED = {
    "average": "('nowhere', width=0.1, out='a.safetensors')",
    "caption": "('nowhere', model='nobody')",
    "demo": "(steps=0)",
    "demo_data": "('pictures', count=0)",
    "diff": "('nowhere', 'nothing')",
    "dry_run": "('nowhere.yaml')",
    "export": "('nowhere', program='bfl', out='a.safetensors')",
    "generate": "([])",
    "generate_folder": "('nowhere.txt', out='drawn')",
    "grid": "([])",
    "inspect_attention": "('nowhere', [])",
    "inspect_layers": "('nowhere')",
    "load_adapter": "('nowhere')",
    "merge": "('nowhere', ['nothing'], out='model')",
    "open_model": "('nowhere')",
    "prepare": "('nowhere.yaml')",
    "probe": "('nowhere')",
    "probe_few_steps": "('nowhere')",
    "remake": "('nowhere.png')",
    "sweep": "('nowhere')",
    "train": "('nowhere.yaml')",
    "LibreFluxPipeline": ".from_pretrained('nowhere')",
    "Recipe": "(model='emoji-base')",
}
"""A call of each name that it refuses at once, in one line."""
EVERY_MODULE = """\
import importlib, pkgutil, sys
import libreflux
from libreflux.errors import LibrefluxError
for module in pkgutil.walk_packages(libreflux.__path__, "libreflux."):
    if not module.name.endswith("__main__"):  # it runs the command line
        importlib.import_module(module.name)
assert "libreflux.workflows.merge" in sys.modules and "libreflux.cli.app" in sys.modules
for name, call in zip(sys.argv[1::2], sys.argv[2::2]):
    assert f"libreflux.{name}" not in sys.modules, f"a module hides libreflux.{name}"
    assert name in dir(libreflux)
    try:
        eval(f"libreflux.{name}{call}")
    except (LibrefluxError, ValueError):  # pydantic's, of Recipe, is a ValueError
        continue
    raise AssertionError(f"libreflux.{name}{call} was not refused")
"""


def test_no_module_hides_a_name_and_each_can_be_called(tmp_path: Path) -> None:
    assert {"Recipe", "merge", "average", "probe", "export", "load_adapter", "open_model"} <= set(NAMES)
    assert sorted(REFUSED) == sorted(NAMES)
    calls = [word for row in REFUSED.items() for word in row]
    command = [sys.executable, "-c", EVERY_MODULE, *calls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_told(name: str) -> None:
    assert libreflux.__doc__ is not None
    assert f"libreflux.{name}" in libreflux.__doc__
    assert name in dir(libreflux)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'libreflux' has no attribute 'nothing'"):
        libreflux.nothing  # noqa: B018

"""The arrows of the house: which room may import which, read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import libreflux

ROOT = Path(libreflux.__file__).parent
GROUND = {
    "recipe",
    "checksums",
    "files",
    "places",
    "seeding",
    "errors",
    "printing",
    "plainjson",
    "decided",
    "values",
    "locks",
}
BELOW: dict[str, set[str]] = {
    "printing": set(),
    "plainjson": set(),
    "checksums": set(),
    "errors": {"printing"},
    "seeding": set(),
    "decided": set(),
    "values": {"errors"},
    "places": {"errors"},
    "locks": {"errors", "places", "printing"},
    "files": {"errors", "locks", "places", "plainjson", "printing"},
    "recipe": {"errors", "files", "seeding", "places", "values"},
    "flow": set(),
    "model": GROUND | {"flow"},
    "adapter": GROUND | {"flow", "model"},
    "data": GROUND | {"flow", "model"},
    "training": GROUND | {"flow", "model", "adapter", "data"},
    "sample": GROUND | {"flow", "model", "adapter", "data"},
    "probing": GROUND | {"flow", "model", "adapter", "data", "sample"},
    "emoji": GROUND | {"flow", "model", "adapter", "data", "training", "sample", "probing"},
    "workflows": GROUND | {"flow", "model", "adapter", "data", "training", "sample", "probing", "emoji"},
    "cli": GROUND | {"", "flow", "model", "adapter", "data", "training", "sample", "probing", "emoji", "workflows"},
    "": {"model", "recipe", "sample", "workflows"},
    "__main__": {"cli"},
}
"""Room -> the other rooms it may import; "" is the package's own __init__, which holds the version."""
VERSION_READERS = set(BELOW) - {"flow"}


def room(module: str) -> str:
    """The room of a module of ours: libreflux.flow.path -> flow."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_name(path: Path) -> str:
    parts = ["libreflux", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names a file imports, `from a import b` as a.b; with `top_only`, those that importing the file runs."""
    stack = list(ast.iter_child_nodes(tree))
    while stack:
        node = stack.pop()
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if top_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".") if path.stem == "__init__" else module_name(path).split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            stack.extend(ast.iter_child_nodes(node))


def our_rooms(path: Path, source: str, *, top_only: bool = False) -> set[str]:
    """Rooms that a file imports; `from libreflux import __version__` counts as "" (itself)."""
    rooms = set()
    for name in imports(ast.parse(source), path, top_only=top_only):
        if name.split(".")[0] == "libreflux":
            found = room(name)
            rooms.add(found if found in BELOW else "")
    return rooms


def wrong_arrows(path: Path, source: str) -> set[str]:
    own = room(module_name(path))
    allowed = BELOW[own] | {own} | ({""} if own in VERSION_READERS else set())
    return our_rooms(path, source) - allowed


FILES = sorted(ROOT.rglob("*.py"))


def test_every_file_has_a_room() -> None:
    assert len(FILES) > 20
    assert {room(module_name(path)) for path in FILES} <= set(BELOW)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_downwards(path: Path) -> None:
    wrong = wrong_arrows(path, path.read_text(encoding="utf-8"))
    assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", [p for p in FILES if room(module_name(p)) == "flow"], ids=lambda path: path.name)
def test_flow_imports_only_torch(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")), path)}
    assert tops <= set(sys.stdlib_module_names) | {"torch", "libreflux"}


def loaded_at_import(starts: set[str]) -> dict[str, set[str]]:
    """Our modules that importing these runs, each with the top names of what it imports at once itself."""
    paths = {module_name(path): path for path in FILES}
    todo, seen = list(starts), dict[str, set[str]]()
    while todo:
        name = todo.pop()
        if name in seen or name not in paths:
            continue
        found = set(imports(ast.parse(paths[name].read_text(encoding="utf-8")), paths[name], top_only=True))
        seen[name] = {one.split(".")[0] for one in found}
        for one in (one for one in found if one.split(".")[0] == "libreflux"):
            parts = one.split(".")
            todo.extend(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return seen


def test_the_ground_and_the_command_line_load_no_heavy_library_when_imported() -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "einops", "safetensors", "matplotlib", "scipy"}
    loaded = loaded_at_import({"libreflux.__main__", *(f"libreflux.{name}" for name in GROUND)})
    assert {"libreflux", "libreflux.cli.app", "libreflux.recipe"} <= set(loaded)
    assert not {name: tops & heavy for name, tops in loaded.items() if tops & heavy}
    assert loaded_at_import({"libreflux.flow.path"})["libreflux.flow.path"] >= {"torch"}


def test_the_reader_sees_wrong_arrows() -> None:
    """The test above can fail: every way of writing an import is seen."""
    model, train, flow = ROOT / "model/x.py", ROOT / "training/x.py", ROOT / "flow/x.py"
    assert wrong_arrows(model, "import libreflux.adapter.io") == {"adapter"}
    assert wrong_arrows(model, "def f():\n    from libreflux.cli import main") == {"cli"}
    assert wrong_arrows(train, "from libreflux import sample, flow") == {"sample"}
    assert wrong_arrows(train, "from ..sample import grid\nfrom . import loop\nfrom .. import flow") == {"sample"}
    assert wrong_arrows(train, "if x:\n    try:\n        import libreflux.probing\n    except E: pass") == {"probing"}
    assert wrong_arrows(flow, "from libreflux.errors import LibrefluxError") == {"errors"}
    assert wrong_arrows(flow, "from libreflux.flow import path\nimport torch") == set()
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"
    assert "torch" not in set(imports(ast.parse(lazy), model, top_only=True))
    assert "torch" in set(imports(ast.parse("try:\n    import torch\nfinally:\n    pass"), model, top_only=True))


HEAVY_PROBE = "import sys; heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules); assert not heavy, heavy"


@pytest.mark.parametrize(
    "code",
    [
        "import libreflux; libreflux.__version__; dir(libreflux)",
        "import libreflux.recipe, libreflux.files, libreflux.seeding, libreflux.errors",
        "import sys; sys.argv = ['libreflux', '--help']\nfrom libreflux.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code",
        "import sys; sys.argv = ['libreflux', 'generate', '--help']\nfrom libreflux.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code",
    ],
    ids=["import", "ground", "help", "verb-help"],
)
def test_no_torch_is_loaded_by(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"{code}\n{HEAVY_PROBE}"], check=True, capture_output=True, timeout=60)

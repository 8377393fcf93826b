"""What importing a part of this package loads. Which room may import which: the contracts of pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import libreflux

ROOT = Path(libreflux.__file__).parent
GROUND = sorted(path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("_"))
FILES = sorted(ROOT.rglob("*.py"))


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
    loaded = loaded_at_import({"libreflux.__main__", "libreflux.recipe", *(f"libreflux.{name}" for name in GROUND)})
    assert {"libreflux", "libreflux.cli.app", "libreflux.recipe"} <= set(loaded)
    assert not {name: tops & heavy for name, tops in loaded.items() if tops & heavy}
    assert loaded_at_import({"libreflux.flow.path"})["libreflux.flow.path"] >= {"torch"}


def test_imports_within_functions_and_for_type_checkers_are_told_apart() -> None:
    path = ROOT / "model/x.py"
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"
    assert "torch" not in set(imports(ast.parse(lazy), path, top_only=True))
    assert "torch" in set(imports(ast.parse(lazy), path))
    assert "torch" in set(imports(ast.parse("try:\n    import torch\nfinally:\n    pass"), path, top_only=True))
    assert set(imports(ast.parse("from ..sample import grid"), path)) == {"libreflux.sample.grid"}


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

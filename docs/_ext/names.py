"""Names that the documentation writes as code, and the lines of this repository that they mean. Imports nothing of it.

A page that writes `libreflux.flow.path.interpolate` or `tests/test_files.py::test_lock` names a definition. If the
definition moves or goes, `locate` raises, and the build of the documentation stops.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOTTED = re.compile(r"libreflux(\.[A-Za-z_]\w*)+")
IN_REPOSITORY = re.compile(r"(?:src|tests|docs|recipes|benchmarks)/[\w./-]+(?:::[A-Za-z_]\w*)?")
FILES = ("libreflux.json", "libreflux.safetensors")
"""Names of files that look like dotted names."""


class UnknownNameError(Exception):
    """A page names a definition or a file that this repository does not have."""


@dataclass(frozen=True)
class Place:
    """Where a name is defined: a file, relative to the repository's root, and a line, from 1."""

    file: str
    line: int = 1


def locate(text: str) -> Place | None:
    """The place that inline code means; None for code that is no name of this repository.

    Args:
        text: `libreflux.package.module.Class.method`, also with `()` behind it; `src/libreflux/files.py`; or
            `tests/test_files.py::test_name`.

    Raises:
        UnknownNameError: it looks like such a name, and there is nothing of this name.
    """
    name = text.removesuffix("()")
    if DOTTED.fullmatch(name) and name not in FILES:
        return _dotted(tuple(name.split(".")), text)
    if IN_REPOSITORY.fullmatch(name):
        file, _, inner = name.partition("::")
        if not (ROOT / file).exists():
            raise UnknownNameError(f"{text}: no such file")
        return Place(file, _line_in(ROOT / file, (inner,), text)) if inner else Place(file)
    return None


def _dotted(parts: tuple[str, ...], text: str) -> Place:
    for count in range(len(parts), 0, -1):
        stem = ROOT.joinpath("src", *parts[:count])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return _inside(file, parts[count:], text)
    raise UnknownNameError(f"{text}: no such module")


def _inside(file: Path, inner: tuple[str, ...], text: str) -> Place:
    relative = file.relative_to(ROOT).as_posix()
    if not inner:
        return Place(relative)
    for node in ast.walk(_tree(file)):  # a name that is passed on is shown where it is defined
        if isinstance(node, ast.ImportFrom) and node.module and any(one.name == inner[0] for one in node.names):
            return _dotted((*node.module.split("."), *inner), text)
    return Place(relative, _line_in(file, inner, text))


def _line_in(file: Path, inner: tuple[str, ...], text: str) -> int:
    body, line = _tree(file).body, 1
    for name in inner:
        node = next((node for node in body if name in _defined(node)), None)
        if node is None:
            raise UnknownNameError(f"{text}: {file.relative_to(ROOT).as_posix()} does not define {name}")
        body, line = getattr(node, "body", []), node.lineno
    return line


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]

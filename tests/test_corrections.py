"""docs/corrections.md names tests that pytest collects; those of its first eight rows use the original behaviour."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_names_a_collected_test_and_the_first_eight_use_an_original() -> None:
    lines = (ROOT / "docs/corrections.md").read_text("utf-8").splitlines()
    cells = [line.strip().strip("|").rpartition("|")[2] for line in lines if line.startswith("|")][2:]
    rows = [re.findall(r"`([^`]+)`", cell) for cell in cells]
    assert len(rows) >= 8
    assert all(rows)
    found = collected(sorted({name.partition("::")[0] for row in rows for name in row}))
    missing = [name for row in rows for name in row if name not in found]
    assert not missing
    for name in (row[0] for row in rows[:8]):
        assert uses_an_original(*name.split("::")), name


def collected(paths: list[str]) -> set[str]:
    """`path::name` of each test function that pytest finds in these files, and the paths of files that have one."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--color=no", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    return names | {name.partition("::")[0] for name in names}


def uses_an_original(path: str, name: str) -> bool:
    """Whether a test function reads an `original_…` that its file defines."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    [test] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    read = {node.id for node in ast.walk(test) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return any(used.startswith("original_") for used in read & defined)

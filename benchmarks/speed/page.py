"""docs/performance.md from recorded runs: the fixed sentences are in page.md, the tables are written here."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.results import HEAD, cells, number, present

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
NONE = "No run of this version is recorded yet."
SIZES = {"slice": "the slice", "full": "the whole of FLUX.1", "emoji": "the emoji transformer: it proves that all runs"}
NAMES = {
    "limits": "The machine's own limits",
    "prepare": "Preparing the emoji family's pictures",
    "estimate": "The estimate of memory beside the measured peak",
}


def page(files: Sequence[Path] | None = None) -> str:
    """The page.

    Args:
        files: as `--json` writes them; None: those in benchmarks/speed/recorded.

    Raises:
        ValueError: a file is none of them.
    """
    chosen = sorted(RECORDED.glob("*.json")) if files is None else files
    measured = "\n\n".join(_run(file) for file in chosen) or NONE
    return string.Template((HERE / "page.md").read_text(encoding="utf-8")).substitute(measured=measured)


def _run(file: Path) -> str:
    tree = json.loads(file.read_text(encoding="utf-8"))
    parts = tree.get("parts") if isinstance(tree, dict) else None
    if not parts:
        raise ValueError(f"{file}: holds no parts; write it with --json")
    blocks = []
    for key in dict.fromkeys(_key(part) for part in parts):
        alike = [part for part in parts if _key(part) == key]
        blocks.append("\n\n".join([_heading(alike), *(table for part in alike for table in tables(part))]))
    return "\n\n".join(blocks)


def _key(part: Mapping[str, Any]) -> tuple[str, str, str]:
    """Parts of one machine and size stand together."""
    return part["machine"]["name"], part["size"], "quick" if part["quick"] else ""


def _heading(parts: Sequence[Mapping[str, Any]]) -> str:
    first, machine = parts[0], parts[0]["machine"]
    dates = sorted({part["date"] for part in parts})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = (
        f"{machine['name']}, {machine['memory_gib']:.0f} GiB" if machine["device"] == "cuda" else _processor(machine)
    )
    short = " A quick run: fewer rounds, contenders and pixels." if first["quick"] else ""
    return f"### {where}: {SIZES[first['size']]}\n\nMeasured {days}; {versions}.{short}"


def _processor(machine: Mapping[str, Any]) -> str:
    threads = machine["threads"]
    kind = machine["capability"].replace("_", "-").replace("DEFAULT", "no AVX")
    return f"{machine['name']} ({kind}), {threads} {'thread' if threads == 1 else 'threads'}"


def tables(part: Mapping[str, Any]) -> list[str]:
    """A part's tables in Markdown, each under its title."""
    found = [_table(row) for row in part["rows"]]
    if part["figures"]:
        lines = [[one["name"], f"{number(one['value'])} {one['unit']}".strip()] for one in part["figures"]]
        found.append(f"**{NAMES.get(part['part'], part['part'])}**\n\n{_markdown([['what', 'figure'], *lines])}")
    return found


def _table(row: Mapping[str, Any]) -> str:
    references = present(row)
    head = [*HEAD[:3], *(f"times as fast as {name}" for name in references), *HEAD[3:]]
    lines = [cells(one, references) for one in row["contenders"] if "median" in one]
    title = row["title"][0].upper() + row["title"][1:]
    limit = "" if row["limit_seconds"] is None else f" (limit: {number(row['limit_seconds'])} s)"
    missing = [f"{one['name']}: {one['reason']}." for one in row["contenders"] if "median" not in one]
    body = [
        f"**{title}**{limit}",
        *([_markdown([head, *lines])] if lines else []),
        *([" ".join(missing)] * bool(missing)),
    ]
    return "\n\n".join(body)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; columns without a cell are left out."""
    kept = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
    rows = ["| " + " | ".join(line[column] for column in kept) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(kept), *rows[1:]])

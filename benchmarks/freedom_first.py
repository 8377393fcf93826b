"""How free is emoji-libre, and what freed it? Probes the emoji models, prints a table, and writes every measure as CSV.

    python benchmarks/freedom_first.py --work DIR                          # a table of the main measures
    python benchmarks/freedom_first.py --work DIR --controls            # the recipe on emoji-base and on random weights
    python benchmarks/freedom_first.py --work DIR --csv docs/freedom.csv   # every measure of both, by subjects
    python benchmarks/freedom_plots.py                               # then: the plots of docs/freedom.md

Before it, in the same DIR: `make emoji` and `python -m libreflux.emoji.build controls`. DIR/runs holds the adapters.
Results are kept in DIR/probes and used again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from libreflux.emoji.build.students import seen_subjects
from libreflux.probing.freedom import FreedomRow, freedom
from libreflux.probing.report.labels import number, place, title
from libreflux.probing.results import Result, read_result

SWEEP = {
    "schnell": ["emoji-schnell"],
    "50 steps": ["emoji-schnell", "--adapter", "free-50"],
    "250 steps": ["emoji-schnell", "--adapter", "free-250"],
    "emoji-libre": ["emoji-libre"],
    "base": ["emoji-base"],
}
CONTROLS = {
    "schnell": ["emoji-schnell"],
    "emoji-libre": ["emoji-libre"],
    "recipe on base": ["emoji-base", "--adapter", "control-base"],
    "recipe on random": ["random", "--adapter", "control-random"],
    "base": ["emoji-base"],
}
ENDS = ("schnell", "base")
FULL = ["--prompts", "24", "--guidance", "1,2,4,8", "--steps", "4,28"]
QUICK = ["--quick", "--guidance", "1,4,6"]
Places = Sequence[tuple[str, dict[str, object]]]
BRIEF: Places = (
    ("loss", {"sigma": "all", "text": "caption"}),
    ("loss", {"sigma": "all", "text": "empty"}),
    ("slope", {"sigma": 0.5, "text": "caption"}),
    ("slope", {"sigma": 0.9, "text": "caption"}),
    ("slope", {"sigma": 0.98, "text": "caption"}),
    ("slope", {"sigma": "all", "text": "caption"}),
    ("prompt_gain", {"sigma": 0.9}),
    ("guidance_response", {"sigma": 0.9}),
    ("clipped", {"guidance": 1.0}),
    ("clipped", {"guidance": 4.0}),
    ("latents_std", {"guidance": 4.0}),
    ("accuracy", {"guidance": 4.0, "what": "all"}),
    ("accuracy", {"steps": 4, "guidance": "own", "what": "all"}),
    ("distance", {"guidance": 4.0, "kind": "FD"}),
    ("step_gap", {"steps": 4, "against": 28}),
    ("straightness", {}),
    ("diversity", {"guidance": 1.0, "kind": "features"}),
    ("negative", {"what": "subject"}),
    ("padding", {"padding": "drop", "tokens": 20}),
)
"""What the printed table has of all that is measured."""
COLUMNS = (
    "table",
    "subjects",
    "measure",
    "place",
    "model",
    "value",
    "low",
    "high",
    "freedom",
    "freedom_low",
    "freedom_high",
    "verdict",
    "beyond",
)
"""Of the CSV file: one row for each measure of each model. Freedom is in per cent; schnell and base have none."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument(
        "--csv", type=Path, help="write every measure, of both tables, for all, seen and unseen subjects"
    )
    args = parser.parse_args()
    seen = args.work / "seen-subjects.txt"
    seen.write_text("\n".join(seen_subjects()) + "\n", encoding="utf-8")
    if args.csv is None:
        results, freed = _measured(args.work, seen, controls=args.controls)
        _print_table(results, freed)
        return 0
    with args.csv.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        results, freed = _measured(args.work, seen, controls=False)
        for subjects in ("all", "seen", "unseen"):
            writer.writerows(csv_rows("steps", results, freed, subjects))
        results, freed = _measured(args.work, seen, controls=True)
        writer.writerows(csv_rows("controls", results, freed, "all", only=BRIEF))
    return 0


def _measured(work: Path, seen: Path, *, controls: bool) -> tuple[dict[str, Result], dict[str, list[FreedomRow]]]:
    """The results of a table's models, and the freedom of those that are neither schnell nor base."""
    models = CONTROLS if controls else SWEEP
    results = {name: _probed(work, name, words, controls, seen) for name, words in models.items()}
    middle = [name for name in models if name not in ENDS]
    return results, {name: freedom(results[name], results["schnell"], results["base"]) for name in middle}


def _probed(work: Path, name: str, words: Sequence[str], quick: bool, seen: Path) -> Result:
    out = work / "probes" / f"{name.replace(' ', '-')}{'-quick' if quick else ''}"
    model, *rest = words
    model = str(work / "m" / "random") if model == "random" else model
    adapter = ["--adapter", str(work / "runs" / rest[1])] if rest else []
    command = [sys.executable, "-m", "libreflux", "probe", model, *adapter, "--seen", str(seen), "--out", str(out)]
    subprocess.run([*command, *(QUICK if quick else FULL)], check=True, stdout=subprocess.DEVNULL)
    return read_result(out)


def csv_rows(
    table: str,
    results: dict[str, Result],
    freed: dict[str, list[FreedomRow]],
    subjects: str,
    only: Places | None = None,
) -> Iterator[list[str]]:
    """A table's rows, by `COLUMNS`.

    Args:
        table: its name in the file.
        results: by model, schnell first and base last.
        freed: the freedom of each model between them.
        subjects: "all", "seen" or "unseen".
        only: the measures to write; None: all that were made.
    """
    for row, parts in _rows(freed, subjects, only):
        label, at = title(row.name, row.at, "emoji")
        for name, result in results.items():
            part = parts.get(name)
            if part is None and name not in ENDS:
                continue
            value = row.distilled if name == "schnell" else row.reference if part is None else part.freed
            shown = [one.replace("–", "nan") for one in _value(result, row, value)]
            yield [table, subjects, label, place(at), name, *shown, *_share(part)]


def _rows(
    freed: dict[str, list[FreedomRow]], subjects: str, only: Places | None
) -> Iterator[tuple[FreedomRow, dict[str, FreedomRow]]]:
    """Each measure of the first freed model, with the same measure of every freed model by its name."""
    found = {name: {_key(row): row for row in rows} for name, rows in freed.items()}
    first = [row for row in next(iter(freed.values())) if row.subset == subjects]
    if only is not None:
        first = [row for name, at in only for row in first if row.name == name and dict(row.at) == at]
    for row in first:
        yield row, {name: rows[_key(row)] for name, rows in found.items() if _key(row) in rows}


def _share(row: FreedomRow | None) -> list[str]:
    if row is None:
        return [""] * 5
    numbers = [f"{100 * one:.0f}" for one in (row.share, row.low, row.high)] if row.verdict == "gap" else [""] * 3
    return [*numbers, row.verdict, "yes" if row.beyond else ""]


def _print_table(results: dict[str, Result], freed: dict[str, list[FreedomRow]]) -> None:
    print(f"| measure | schnell | {' | '.join(f'{name} (freedom)' for name in freed)} | base |")
    print("|---" * (len(freed) + 3) + "|")
    for row, parts in _rows(freed, "all", BRIEF):
        label, at = title(row.name, row.at, "emoji")
        middle = [
            f"{_cell(results[name], row, parts[name].freed)} ({parts[name].text})" if name in parts else "–"
            for name in freed
        ]
        ends = [_cell(results["schnell"], row, row.distilled), _cell(results["base"], row, row.reference)]
        print(f"| {f'{label}, {place(at)}' if at else label} | {ends[0]} | {' | '.join(middle)} | {ends[1]} |")


def _key(row: FreedomRow) -> tuple[object, ...]:
    return row.name, tuple(sorted(row.at.items(), key=str)), row.subset


def _cell(result: Result, row: FreedomRow, value: float) -> str:
    shown, low, high = _value(result, row, value)
    return f"{shown} [{low}, {high}]" if low else shown


def _value(result: Result, row: FreedomRow, value: float) -> tuple[str, str, str]:
    """A value and the ends of its interval; a mean of several measures has no interval."""
    at = dict(row.at)
    if at.get("guidance") == "own":
        at["guidance"] = result.settings["own_guidance"]
    one = result.find(row.name, row.subset, **at)
    return (number(value), "", "") if one is None else (number(one.value), number(one.low), number(one.high))


if __name__ == "__main__":
    sys.exit(main())

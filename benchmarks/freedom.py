"""How free is emoji-libre, and what was it that freed it? Probes the emoji models and prints their tables as Markdown.

    python benchmarks/freedom.py --work DIR                 # after `python -m libreflux.emoji.build controls`, same DIR
    python benchmarks/freedom.py --work DIR --controls      # the recipe on emoji-base and on random weights: quick
    python benchmarks/freedom.py --work DIR --all           # every measure, by subjects

DIR/runs holds the adapters; results are kept in DIR/probes and used again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from libreflux.emoji.build.students import seen_subjects
from libreflux.probe.freedom import FreedomRow, freedom
from libreflux.probe.results import Result, read_result
from libreflux.probe.words import number, place, title

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
FULL = ["--prompts", "24", "--guidance", "1,2,4,8", "--steps", "4,28"]
QUICK = ["--quick", "--guidance", "1,4,6"]
BRIEF = (
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
    ("accuracy", {"guidance": 4.0, "what": "both"}),
    ("accuracy", {"steps": 4, "guidance": "own", "what": "both"}),
    ("distance", {"guidance": 4.0, "kind": "FD"}),
    ("step_gap", {"steps": 4, "against": 28}),
    ("straightness", {}),
    ("diversity", {"guidance": 1.0, "kind": "features"}),
    ("negative", {"what": "subject"}),
    ("padding", {"padding": "drop", "tokens": 20}),
)
"""What the README's table has of all that is measured."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--all", action="store_true", help="every measure, for all, seen and unseen subjects")
    args = parser.parse_args()
    seen = args.work / "seen-subjects.txt"
    seen.write_text("\n".join(seen_subjects()) + "\n", encoding="utf-8")
    models = CONTROLS if args.controls else SWEEP
    results = {name: _probed(args.work, name, words, args.controls, seen) for name, words in models.items()}
    middle = [name for name in models if name not in ("schnell", "base")]
    tables = {name: freedom(results[name], results["schnell"], results["base"]) for name in middle}
    for subset in ("all", "seen", "unseen") if args.all else ("all",):
        print(f"\n### {subset} subjects\n" if args.all else "")
        _table(results, tables, middle, subset, brief=not args.all)
    return 0


def _probed(work: Path, name: str, words: Sequence[str], quick: bool, seen: Path) -> Result:
    out = work / "probes" / f"{name.replace(' ', '-')}{'-quick' if quick else ''}"
    model, *rest = words
    model = str(work / "m" / "random") if model == "random" else model
    adapter = ["--adapter", str(work / "runs" / rest[1])] if rest else []
    command = [sys.executable, "-m", "libreflux", "probe", model, *adapter, "--seen", str(seen), "--out", str(out)]
    subprocess.run([*command, *(QUICK if quick else FULL)], check=True, stdout=subprocess.DEVNULL)
    return read_result(out)


def _table(
    results: dict[str, Result], tables: dict[str, list[FreedomRow]], middle: Sequence[str], subset: str, *, brief: bool
) -> None:
    first = [row for row in tables[middle[0]] if row.subset == subset]
    if brief:
        places = [(name, dict(at)) for name, at in BRIEF]
        first = [row for name, at in places for row in first if row.name == name and dict(row.at) == at]
    found = {
        name: {(row.name, tuple(sorted(row.at.items())), row.subset): row for row in tables[name]} for name in middle
    }
    print(f"| measure | schnell | {' | '.join(f'{name} (freedom)' for name in middle)} | base |")
    print("|---" * (len(middle) + 3) + "|")
    for row in first:
        cells = []
        for name in middle:
            one = found[name].get(_key(row))
            cells.append("–" if one is None else f"{_value(results[name], row, one.freed)} ({one.text})")
        ends = [_value(results["schnell"], row, row.distilled), _value(results["base"], row, row.reference)]
        label, at = title(row.name, row.at, "emoji")
        label = f"{label}, {place(at)}" if at else label
        print(f"| {label} | {ends[0]} | {' | '.join(cells)} | {ends[1]} |")


def _key(row: FreedomRow) -> tuple[object, ...]:
    return row.name, tuple(sorted(row.at.items(), key=str)), row.subset


def _value(result: Result, row: FreedomRow, value: float) -> str:
    """With its interval where it is one measure and no mean of several."""
    at = dict(row.at)
    if at.get("guidance") == "own":
        at["guidance"] = result.settings["own_guidance"]
    one = result.find(row.name, row.subset, **at)
    return number(value) if one is None else f"{number(one.value)} [{number(one.low)}, {number(one.high)}]"


if __name__ == "__main__":
    sys.exit(main())

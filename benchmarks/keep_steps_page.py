"""The table, plots and page of benchmarks/keep_steps.py, from what its runs left in DIR/results."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from libreflux.files import atomic_write_text
from libreflux.probing.few_steps import KEEP
from libreflux.probing.report.html import document, table

MEASURES = ("accuracy", "agreement", "picture distance", "FD", "KD", "sharpness")
COLUMNS = (
    *("set", "arm", "seed", "step", "kept", "kept_low", "kept_high", "kept_by"),
    *("learnt", "learnt_low", "learnt_high", "learnt_by"),
    *(f"kept_{name.replace(' ', '_')}" for name in MEASURES),
    *("learnt_FD", "learnt_KD", "guidance_distilled", "guidance_adapted", "seconds"),
)
COLOURS = ("#1f6fb4", "#c4420a", "#0a7f5c", "#9a4a86", "#8a6a00", "#555555")
MARKS = "osD^vP"
STYLE = {"svg.hashsalt": "libreflux", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
Row = dict[str, Any]


def write_results(work: Path, title: str, main: Sequence[str]) -> list[Path]:
    """Writes keep-steps.csv, a plot of each set, and index.html into a folder.

    Args:
        work: with `results`.
        title: of the page: model, steps, and whether it is a trial.
        main: the arms that have several seeds; the others are marked.
    """
    rows = list(read_rows(work / "results"))
    held = io.StringIO()
    writer = csv.DictWriter(held, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(row[name]) for name in COLUMNS} for row in rows)
    written = [work / "keep-steps.csv"]
    atomic_write_text(written[0], held.getvalue())
    parts = [f"<h1>Fine-tuned, and how many steps are kept?</h1><p>{html.escape(title)}.</p>"]
    for name in dict.fromkeys(row["set"] for row in rows):
        here = [row for row in rows if row["set"] == name]
        written.append(work / f"pareto-{name}.svg")
        drawn = pareto(here, name)
        atomic_write_text(written[-1], drawn)
        parts += [f"<h2>{html.escape(name)}</h2><p class='verdict'>{html.escape(sentence(here))}</p>", drawn]
        parts.append(table(HEADS, list(lines(here, main)), 1))
    parts.append(f"<p class='faint'>{NOTE}</p>")
    written.append(work / "index.html")
    atomic_write_text(written[-1], document("libreflux: few steps kept", "\n".join(parts)))
    return written


HEADS = ("arm", "seeds", "step", "kept [95 %]", "by", "learnt [95 %]", "by", "below 90 % from step", "seconds")
NOTE = """Of each arm the checkpoint with the most learnt among those that keep 90 %, or else the one that keeps the
most; shares are the lowest measure's that is not too noisy, means over the seeds; intervals are of the first seed, over
pictures and prompts. A dagger marks an arm that is run with one seed. A line in a plot joins the checkpoints of an arm;
the grey line is the Pareto front: nothing is better in both. What is too noisy is left out of plots. How the shares are
defined: docs/keep-steps.md. Seconds are of training, with what an arm needs first where that was not there yet. The
page of each run, with pictures, is in the folder pages."""


def read_rows(results: Path) -> Iterator[Row]:
    """A row for each checkpoint of each finished run, by set, arm, seed and step."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    for one in sorted(told, key=lambda one: (one["set"], one["arm"], one["seed"])):
        for point in sorted(one["points"], key=lambda point: point["step"] or 0):
            row: Row = {name: one[name] for name in ("set", "arm", "seed", "seconds")} | {"step": point["step"]}
            for which in ("kept", "learnt"):
                lead = point[which][0]
                row |= {which: _value(lead), f"{which}_by": lead["by"]}
                row |= {f"{which}_{end}": _value({**lead, "value": lead[end]}) for end in ("low", "high")}
                row |= {f"{which}_{share['by'].replace(' ', '_')}": _value(share) for share in point[which]}
            answer = point["guidance_answer"] or {"distilled": {"value": None}, "adapted": {"value": None}}
            row |= {f"guidance_{of}": answer[of]["value"] for of in ("distilled", "adapted")}
            yield {name: row.get(name) for name in COLUMNS}


def best(rows: Sequence[Row]) -> Row:
    """The checkpoint of one arm and seed that a user would take."""
    known = [row for row in rows if row["kept"] is not None] or list(rows)
    enough = [row for row in known if (row["kept"] or 0) >= KEEP and row["learnt"] is not None]
    if enough:
        return max(enough, key=lambda row: row["learnt"])
    return max(known, key=lambda row: -math.inf if row["kept"] is None else row["kept"])


def lines(rows: Sequence[Row], main: Sequence[str]) -> Iterator[list[str]]:
    """The table's lines, the arm that has learnt the most while keeping enough first."""
    arms = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        seeds = dict.fromkeys(row["seed"] for row in rows if row["arm"] == arm)
        arms[arm] = [best([row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]) for seed in seeds]
    order = sorted(arms, key=lambda arm: _rank(arms[arm]), reverse=True)
    for arm in order:
        found = arms[arm]
        broken = [row["step"] for row in rows if row["arm"] == arm and row["kept"] is not None and row["kept"] < KEEP]
        yield [
            arm if arm in main else f"{arm} †",
            str(len(found)),
            "–" if found[0]["step"] is None else f"{found[0]['step']:,}",
            *(_told(found, "kept"), str(found[0]["kept_by"])),
            *(_told(found, "learnt"), str(found[0]["learnt_by"])),
            f"{min(broken):,}" if broken else "none",
            f"{found[0]['seconds']:,}",
        ]


def sentence(rows: Sequence[Row]) -> str:
    """Which way to use, after these runs."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    taken = [best([row for row in rows if row["arm"] == arm]) for arm in arms]
    good = [row for row in taken if (row["kept"] or 0) >= KEEP and row["learnt"] is not None]
    if not good:
        most = max(taken, key=lambda row: -math.inf if row["kept"] is None else row["kept"])
        if most["kept"] is None:
            return "Too noisy to tell."
        return f"No way keeps {KEEP:.0%}. {most['arm']} keeps the most, {most['kept']:.0%}, at step {most['step']:,}."
    most = max(good, key=lambda row: row["learnt"])
    learnt, kept = f"{most['learnt']:.0%}", f"{most['kept']:.0%}"
    return f"Use {most['arm']}, and stop at step {most['step']:,}: it has learnt {learnt} and kept {kept}."


def pareto(rows: Sequence[Row], name: str) -> str:
    """The plot of one set, SVG: kept over learnt."""
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(7.4, 4.6), layout="constrained")
        points = [row for row in rows if row["kept"] is not None and row["learnt"] is not None]
        front = [one for one in points if not any(_beats(other, one) for other in points)]
        front.sort(key=lambda row: row["learnt"])
        panel.plot(*_along(front), color="#bbbbbb", linewidth=5, alpha=0.7, zorder=1, label="Pareto front")
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            colour, mark = COLOURS[number % len(COLOURS)], MARKS[number // len(COLOURS) % len(MARKS)]
            for turn, seed in enumerate(dict.fromkeys(row["seed"] for row in points if row["arm"] == arm)):
                here = [row for row in points if (row["arm"], row["seed"]) == (arm, seed)]
                label = arm if turn == 0 else None
                panel.plot(*_along(here), color=colour, marker=mark, markersize=4.5, linewidth=1, label=label)
        panel.axhline(KEEP, color="#222222", linewidth=0.6, linestyle=":")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if points:  # one arm far outside must not press the others into a corner
            panel.set_ylim(*_limits(points, "kept"))
            panel.set_xlim(*_limits(points, "learnt"))
        panel.set_xlabel(f"learnt of the set “{name}”")
        panel.set_ylabel("few-step ability kept")
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        held = io.StringIO()
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return re.sub(r"[ \t]+$", "", held.getvalue()[held.getvalue().index("<svg") :], flags=re.MULTILINE)


def _along(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["learnt"] for row in rows], [row["kept"] for row in rows]


def _limits(rows: Sequence[Row], name: str) -> tuple[float, float]:
    values = [float(row[name]) for row in rows]
    return max(-0.5, min(values) - 0.1), min(1.5, max(values) + 0.1)


def _beats(one: Row, other: Row) -> bool:
    at_least = one["kept"] >= other["kept"] and one["learnt"] >= other["learnt"]
    return bool(at_least and (one["kept"] > other["kept"] or one["learnt"] > other["learnt"]))


def _rank(found: Sequence[Row]) -> tuple[bool, float]:
    kept = found[0]["kept"] or -math.inf
    learnt = found[0]["learnt"] if found[0]["learnt"] is not None else -math.inf
    return (True, learnt) if kept >= KEEP else (False, kept)


def _told(found: Sequence[Row], which: str) -> str:
    known = [row[which] for row in found if row[which] is not None]
    if not known or found[0][which] is None:
        return "too noisy"
    low, high = (round(100 * found[0][f"{which}_{end}"]) for end in ("low", "high"))
    return f"{round(100 * sum(known) / len(known))} % [{low}, {high}]"


def _value(share: dict[str, Any]) -> float | None:
    return None if share["noisy"] else share["value"]


def _plain(value: object) -> object:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else value

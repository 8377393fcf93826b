"""The plots of docs/freedom.md, drawn from docs/freedom.csv: python benchmarks/freedom_plots.py"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = {
    "schnell": "#c0392b",
    "50 steps": "#e6a23c",
    "250 steps": "#7fb069",
    "emoji-libre": "#2a7f62",
    "base": "#34495e",
}
SHARES = (
    ("loss", "sigma all, caption", "held-out loss, with the prompt"),
    ("loss", "sigma all, empty", "held-out loss, without a prompt"),
    ("slope", "sigma all, caption", "calibration slope"),
    ("slope", "sigma 0.98, caption", "calibration slope at sigma 0.98"),
    ("prompt_gain", "sigma 0.9", "gain by the prompt at sigma 0.9"),
    ("guidance_response", "sigma 0.9", "response to guidance at sigma 0.9"),
    ("clipped", "guidance 4", "clipped colours at guidance 4"),
    ("latents_std", "guidance 4", "spread of latents at guidance 4"),
    ("straightness", "", "straightness of the paths"),
    ("diversity", "guidance 1, features", "diversity over seeds"),
)

Rows = Mapping[tuple[str, str, str], Mapping[str, str]]


def main() -> None:
    style = {"svg.hashsalt": "libreflux", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with (DOCS / "freedom.csv").open(encoding="utf-8", newline="") as file:
        rows: Rows = {
            (row["measure"], row["place"], row["model"]): row
            for row in csv.DictReader(file)
            if (row["table"], row["subjects"]) == ("steps", "all")
        }
    with plt.rc_context(style):
        _save(by_sigma(rows), "freedom-by-sigma.svg")
        _save(shares(rows), "freedom-shares.svg")


def by_sigma(rows: Rows) -> Any:
    """Loss and slope under the caption, by noise level, of the five models."""
    figure, panels = plt.subplots(1, 2, figsize=(6.6, 3.2), layout="constrained")
    for panel, measure, label in zip(panels, ("loss", "slope"), ("held-out loss", "calibration slope"), strict=True):
        for model, colour in COLOURS.items():
            at = sorted(
                (float(found[1]), row)
                for (name, place, whose), row in rows.items()
                if name == measure and whose == model and (found := re.fullmatch(r"sigma ([\d.]+), caption", place))
            )
            sigmas = [sigma for sigma, _ in at]
            low, value, high = ([float(row[end]) for _, row in at] for end in ("low", "value", "high"))
            panel.fill_between(sigmas, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(sigmas, value, color=colour, marker="o", markersize=3, label=model)
        panel.set(xlabel="noise level sigma", ylabel=label, xlim=(0, 1))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].axhline(1, color="black", linewidth=0.8, linestyle=":")
    panels[0].legend(frameon=False)
    return figure


def shares(rows: Rows) -> Any:
    """The share of the distance from schnell to base that each amount of training has closed."""
    figure, panel = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
    for offset, model in zip((0.22, 0.0, -0.22), ("50 steps", "250 steps", "emoji-libre"), strict=True):
        for place, (measure, at, _) in enumerate(reversed(SHARES)):
            row = rows[measure, at, model]
            low, share, high = (float(row[end]) for end in ("freedom_low", "freedom", "freedom_high"))
            panel.plot([low, high], [place + offset] * 2, color=COLOURS[model], linewidth=1.5)
            panel.plot(share, place + offset, "o", color=COLOURS[model], markersize=5, label=None if place else model)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.axvline(100, color="black", linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(SHARES)), [label for _, _, label in reversed(SHARES)])
    panel.set(xlabel="freedom in per cent: 0 is schnell, 100 is base", xlim=(-5, 105))
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.05, 0.0))
    return figure


def _save(figure: Any, name: str) -> None:
    figure.savefig(DOCS / name, format="svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)
    print(DOCS / name)


if __name__ == "__main__":
    main()

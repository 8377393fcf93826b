"""Guidance without freeing beside the freed model: negative prompts, diversity and passes, on the emoji family.

    python benchmarks/guidance.py --work DIR                  # table.md and sheet.png in DIR
    python benchmarks/guidance.py --work DIR --rows 0,1,2,3   # some rows alone

For each row and prompt, eight pictures (seeds 0 to 7) are drawn without a negative prompt. The judge names the
background that most of them have; it becomes the negative prompt of eight more from the same noise. Told are how many
pictures have that background, without and with, how far the first eight are from one another, and how many show their
subject. Rows are few pictures: the table is a trial, without intervals.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import libreflux
from libreflux.emoji.held_out import JUDGE
from libreflux.probing.judges import load_judge
from libreflux.probing.sections.diversity import mean_pairwise
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import save_png

SEEDS = 8
SUBJECTS = ("fox", "rocket", "red apple")


@dataclass(frozen=True)
class Row:
    """One way to draw."""

    name: str
    options: dict[str, Any]
    reads_negative: bool = True


SCHNELL = {"model": "emoji-schnell", "steps": 4, "guidance": 1.0}
BASE_FIRST = {**SCHNELL, "first_steps_from": "emoji-base:1"}
LIBRE = {"model": "emoji-libre", "guidance": 3.0}
ROWS = (
    Row("student", SCHNELL, False),
    Row("student, CFG 3", {**SCHNELL, "guidance": 3.0}),
    Row("student, NAG 4", {**SCHNELL, "nag": 4.0}),
    Row("student, NAG 10, alpha 0.5", {**SCHNELL, "nag": 10.0, "nag_alpha": 0.5}),
    Row("base's first step, student", BASE_FIRST),
    Row("base's first step, student, NAG 4", {**BASE_FIRST, "nag": 4.0}),
    Row("freed, CFG 3, 12 steps", {**LIBRE, "steps": 12}),
    Row("freed, APG 3, 12 steps", {**LIBRE, "steps": 12, "guidance_rule": "apg"}),
    Row("freed, CFG-Zero* 3, 12 steps", {**LIBRE, "steps": 12, "guidance_rule": "cfg-zero", "zero_init": 1}),
)


def drawn(prompt: str, row: Row, negative: str) -> tuple[list[Image.Image], int]:
    """Eight pictures, and the passes of one."""
    options = {**row.options, "negative": negative} if negative else row.options
    pictures = libreflux.generate(prompt, count=SEEDS, device="cpu", **options).pictures
    return [one.image for one in pictures if one.image is not None], pictures[0].record.passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(map(str, range(len(ROWS)))))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    judge = load_judge(JUDGE)
    lines, shown, names = [], [], []
    for row in (ROWS[int(index)] for index in asked.rows.split(",")):
        before = after = right = 0
        distances = []
        for subject in SUBJECTS:
            images, passes = drawn(f"a {subject}", row, "")
            pixels = torch.stack([torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) for one in images])
            verdict = judge(pixels.float() / 127.5 - 1)
            found = [judge.colours[best] for best in verdict.answers["colour"].argmax(1).tolist()]
            right += sum(judge.subjects[best] == subject for best in verdict.answers["subject"].argmax(1).tolist())
            distances.append(float(mean_pairwise(pixels.flatten(1)[None].float() / 255)[0]))
            (colour, count), *_ = Counter(found).most_common(1)
            before += count
            shown.append(images)
            names.append(f"{row.name}: a {subject}")
            if row.reads_negative:
                images, _ = drawn(f"a {subject}", row, f"{colour} background")
                pixels = torch.stack([torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1) for one in images])
                seen = judge(pixels.float() / 127.5 - 1).answers["colour"].argmax(1).tolist()
                after += sum(judge.colours[best] == colour for best in seen)
                shown.append(images)
                names.append(f"... not {colour}")
        total = SEEDS * len(SUBJECTS)
        told = f"{after} of {total}" if row.reads_negative else "cannot"
        line = (
            f"| {row.name} | {passes} | {before} of {total} | {told} | {np.mean(distances):.3f} | {right} of {total} |"
        )
        print(line, flush=True)
        lines.append(line)
    head = "| | passes | commonest background | with it as the negative prompt | distance of seeds | subject right |\n"
    (asked.work / "table.md").write_text(head + "|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n")
    save_png(sheet(shown, names, [str(seed) for seed in range(SEEDS)]), asked.work / "sheet.png")


if __name__ == "__main__":
    main()

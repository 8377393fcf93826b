"""Make models of the artists' pictures: `python -m libreflux.emoji.artists.build STAGE --work DIR`, resumable.

Stages in order: latents, base, export (the base model), judge, schnell (the student), libre (set free from it). Apart:
sheet, forty training scenes for the eye; index, of every scene that they were trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from libreflux.printing import say

STAGES = ("latents", "base", "export", "judge", "schnell", "libre", "all", "sheet", "index")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m libreflux.emoji.artists.build", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for states and latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw scenes")
    parser.add_argument("--scenes", type=int, default=None, help="how many scenes, a multiple of 4,000")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # moments that fade would slow a CPU down
    from libreflux.emoji.artists.build import base, judge, students

    if args.stage == "sheet":
        say(base.draw_sheet(args.work))
    count = args.scenes or base.SCENES
    if args.stage in ("latents", "all"):
        base.make_latents(args.work, count=count, device=args.device, workers=args.workers)
    if args.stage in ("base", "all"):
        base.train(
            args.work,
            steps=args.steps or base.STEPS,
            count=count,
            batch=args.batch or base.BATCH,
            device=args.device,
        )
    if args.stage in ("export", "all"):
        say(base.export(args.work))
    if args.stage in ("judge", "all"):
        trained = judge.train(args.work, steps=args.steps or judge.STEPS, device=args.device)
        say(judge.ceiling(trained))
    if args.stage in ("schnell", "all"):
        say(students.schnell(args.work))
    if args.stage in ("libre", "all"):
        say(students.libre(args.work))
    if args.stage in ("index", "all"):
        say(students.write_index(count))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make the emoji family from nothing: `python -m libreflux.emoji.build STAGE --work DIR`, resumable at every stage.

Stages in order: vae, latents, base, decoder, export, judge, schnell, libre, check (an unlabelled sheet in DIR, for the
eye). Each but the last is a no-op when its result is there. Apart: controls, the recipe of libre with fewer steps, on
emoji-base and on random weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

STAGES = ("vae", "latents", "base", "decoder", "export", "judge", "schnell", "libre", "check", "all", "controls")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m libreflux.emoji.build", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for states and latents")
    parser.add_argument("--steps", type=int, default=None, help="steps of the base, decoder or judge stage")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    from libreflux.emoji.build import base, students, vae

    if args.stage in ("vae", "all"):
        model = vae.train(args.work)
        print(f"held-out PSNR {vae.psnr(model):.2f} dB")
    if args.stage in ("latents", "all"):
        base.make_latents(args.work)
    if args.stage in ("base", "all"):
        base.train(args.work, steps=args.steps or base.STEPS)
    if args.stage in ("decoder", "all"):
        model = vae.train(args.work, decoder_steps=args.steps or vae.DECODER_STEPS)
        print(f"held-out PSNR {vae.psnr(model):.2f} dB")
    if args.stage in ("export", "all"):
        base.export(args.work)
        print(students.ship(args.work, "base"))
    if args.stage in ("judge", "all"):
        from libreflux.emoji.build import judge

        trained = judge.train(args.work, steps=args.steps or judge.STEPS)
        trained.save(judge.WEIGHTS)
        seen = judge.ceiling(trained, args.work)
        rates = ", ".join(f"{question} {right.float().mean():.1%}" for question, right in seen.right.items())
        print(f"held-out reconstructions: {rates}, all {seen.all.float().mean():.1%}")
    if args.stage in ("schnell", "all"):
        students.schnell(args.work)
        print(students.ship(args.work, "schnell"))
    if args.stage in ("libre", "all"):
        students.libre(args.work)
        print(students.ship(args.work, "libre"))
    if args.stage == "controls":
        for run, (model, steps) in students.CONTROLS.items():
            start = students.random_model(args.work) if model is None else model
            print(students.set_free(run, start, args.work, steps=steps))
    if args.stage in ("check", "all"):
        from libreflux.emoji.build import check

        print(check.draw(args.work))
    return 0


if __name__ == "__main__":
    sys.exit(main())

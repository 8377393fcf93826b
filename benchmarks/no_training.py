"""How much of a distillation is undone without any training, beside what training undid.

    python benchmarks/no_training.py --work WORK                # 192 held-out pictures, 8 noise levels
    python benchmarks/no_training.py --work WORK --quick        # 64 pictures, 4 noise levels

What `libreflux probe emoji-libre --against emoji-schnell` says of it (`libreflux.probing.no_training`), by loss and
slope at held-out pictures alone: nothing is drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from libreflux.cli.progress import progress
from libreflux.probing import run
from libreflux.probing.report import no_training
from libreflux.probing.report.labels import place
from libreflux.workflows.probe import probe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--freed", default="emoji-libre")
    parser.add_argument("--distilled", default="emoji-schnell")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--quick", action="store_true")
    told = parser.parse_args(argv)
    run.SECTIONS = run.SECTIONS[:1]  # at pictures
    found = probe(
        told.freed,
        against=told.distilled,
        pictures=told.pictures,
        quick=told.quick,
        out=told.work / f"no-training{'-quick' if told.quick else ''}",
        progress=progress,
    )
    assert found.untrained is not None
    print(no_training.explained(found.untrained))
    print(f"| measure | trained: {told.freed} | {' | '.join(no_training.heads(found.untrained))} |")
    print("|---|---|---|---|")
    for row in found.untrained.rows:
        if row.kind == "k" and row.freed is not None and row.control.at.get("sigma") == "all":
            cells = no_training.cells(found.untrained, row.control)
            print(f"| {row.control.name}, {place(row.control.at)} | {row.freed.text} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

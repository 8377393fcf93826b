"""The adapters that a sweep compares: the last checkpoint, LERP averages, and averages in hindsight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from libreflux import files, plainjson
from libreflux.errors import RunError
from libreflux.training import hindsight
from libreflux.training.hindsight import Averaged, Kept

Kind = Literal["last", "lerp", "width", "cells"]


@dataclass(frozen=True)
class Candidate:
    """One adapter that can be made from what a run has kept; nothing of it is in memory.

    Attributes:
        kind: "last" checkpoint; "lerp" over the checkpoints; "width": an average in hindsight; "cells": one of raw
            checkpoints.
        value: the weight of the newest, or the relative width; 0 of the last checkpoint.
        sources: step and SHA-256 of each file that it is made from, rising.
    """

    kind: Kind
    value: float
    sources: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        """As tables, page and sheet call it."""
        if self.kind == "last":
            return f"step {self.sources[-1][0]:,}, the last"
        return f"LERP {self.value:g}" if self.kind == "lerp" else f"width {self.value:g}"

    @property
    def key(self) -> dict[str, Any]:
        """What decides its tensors, as plain values."""
        return {"kind": self.kind, "value": self.value, "sources": [list(one) for one in self.sources]}

    def make(self, kept: Kept) -> Averaged:
        """Its tensors, in fp32.

        Beside them no more is in memory than some rows of each source at a time, or of a LoRA one layer of each.
        """
        if self.kind == "width":
            return hindsight.average_of(kept, self.value)
        if self.kind == "cells":
            return hindsight.cells_of(kept, self.value)
        if self.kind == "lerp":
            return hindsight.lerp_of(kept, self.value)
        return hindsight.lerp_of(Kept(kept.run, kept.checkpoints[-1:], {}), 1.0)


def candidates_of(
    kept: Kept, lerps: Sequence[float], widths: Sequence[float] | None, usual: Sequence[float]
) -> tuple[list[Candidate], list[float]]:
    """What there is to compare, the last checkpoint first, and the usual widths that cannot be formed.

    Args:
        kept: of the run.
        lerps: weights of the newest.
        widths: as asked for; None: as many of the usual ones as can be formed.
        usual: widths.

    Raises:
        RunError: fewer than two checkpoints, or a width that was asked for and cannot be formed.
    """
    if len(kept.checkpoints) < 2:
        count = (
            "no complete checkpoint" if not kept.checkpoints else "one checkpoint, which nothing can be compared with"
        )
        hint = "train with a smaller save.every and a larger save.keep"
        raise RunError(f"has {count}", where=kept.run, hint=hint)
    raw = tuple((one.step, _sha256(one.path, one.adapter)) for one in kept.checkpoints)
    found = [Candidate("last", 0.0, raw[-1:]), *(Candidate("lerp", float(one), raw) for one in lerps)]
    chosen, left = (usual if widths is None else widths), list[float]()
    if not kept.averages:
        return [*found, *(Candidate("cells", float(one), raw) for one in chosen)], left
    averages = tuple((step, _sha256(path.parent, path)) for step, path in sorted(kept.averages.items()))
    for width in chosen:
        try:
            hindsight.check_average(kept, width)
        except RunError:
            if widths is not None:
                raise
            left.append(width)
        else:
            found.append(Candidate("width", float(width), averages))
    return found, left


def _sha256(folder: Path, file: Path) -> str:
    """As the folder's manifest says, which was verified."""
    manifest = plainjson.parse((folder / files.MANIFEST).read_text(encoding="utf-8"))
    return str(manifest["files"][file.name]["sha256"])

"""How many pictures or prompts stand behind the numbers, and which of these are too few to be trusted far."""

from __future__ import annotations

from collections.abc import Sequence

from libreflux.probing.results import Result

ENOUGH = 30
"""Below it a bootstrap interval of a mean is clearly too narrow (Hesterberg 2015, Am. Stat. 69, sect. 4.2)."""


def warning(results: Sequence[Result]) -> str:
    """Names the measures that are counted over fewer than `ENOUGH`; "" where none is."""
    counts: dict[int, list[str]] = {}
    for one in results[:1]:
        for row in one.measures:
            if row.subset == "all" and row.count is not None and row.count < ENOUGH:
                counts.setdefault(row.count, []).append(row.name)
    if not counts:
        return ""
    told = "; ".join(f"n = {count} {', '.join(dict.fromkeys(names))}" for count, names in sorted(counts.items()))
    return f"Counted over fewer than {ENOUGH} pictures or prompts, so that intervals are too narrow: {told}."


def statement(results: Sequence[Result]) -> str:
    """How intervals were made."""
    replicates = sorted({len(row.replicates) for one in results for row in one.measures})
    if not replicates:
        return ""
    return (
        f"Intervals hold 95 %: of {' or '.join(map(str, replicates))} bootstrap replicates over n pictures or prompts, "
        "and Wilson's for shares of yes and no, such as accuracy."
    )

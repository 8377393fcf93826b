"""What a probe found, in sentences for a reader who knows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

import numpy as np

from libreflux.printing import counted
from libreflux.probing.freedom import FreedomRow
from libreflux.probing.metrics.measures import CONFIDENCE
from libreflux.probing.results import Measure, Result

LOOKED_AT = 4.0
"""The guidance that sentences tell of, or the nearest that was measured: where distilled models burn."""
Told = tuple[float, float, float, str]
"""Value, ends of its interval, and a remark."""


def headlines(results: Sequence[Result], labels: Sequence[str], freedom: Sequence[FreedomRow] = ()) -> list[str]:
    """Sentences as HTML, the plainest first; a measure that not all models have is left out."""
    found = [*_freedom(freedom), *_guidance(results, labels), *_scores(results, labels), *_steps(results, labels)]
    found += [*_velocity(results, labels), *_diversity(results, labels)]
    return [one for one in found if one]


def _guidance(results: Sequence[Result], labels: Sequence[str]) -> Iterator[str]:
    scale = nearest_guidance(results)
    if scale is None:
        return
    real = results[0].find("held_out_clipped")
    beside = f"; in real pictures it is {percent(real.value)}" if real else ""
    yield _sentence(
        "Burnt colours.",
        f"Share of colour values that are too dark or too bright to be shown, where the model is pushed to follow the "
        f"prompt (guidance {scale:g}{beside}):",
        labels,
        [_told(one.find("clipped", guidance=scale)) for one in results],
        percent,
    )
    yield _sentence(
        "Right pictures.",
        f"Share in which the judge finds all that the prompt names, at guidance {scale:g}:",
        labels,
        [_told(one.find("accuracy", guidance=scale, what="all")) for one in results],
        percent,
    )


def _scores(results: Sequence[Result], labels: Sequence[str]) -> Iterator[str]:
    scale = nearest_guidance(results)
    if scale is None:
        return
    real = results[0].find("held_out_agreement")
    cut = results[0].find("agreement_cut", of="prompts")
    beside = f"; of real pictures and their captions it is {_three(real.value)}" if real else ""
    beside += f"; {percent(cut.value)} of the prompts are longer than the CLIP reads" if cut and cut.value else ""
    yield _sentence(
        "Prompt agreement.",
        f"The cosine of pictures and prompts, as a CLIP sees them, at guidance {scale:g}{beside}:",
        labels,
        [_told(one.find("agreement", guidance=scale)) for one in results],
        _three,
    )
    real = results[0].find("held_out_letters")
    beside = f"; in real pictures it is {percent(real.value)}" if real else ""
    yield _sentence(
        "Text.",
        f"Share of the letters right of texts that prompts quote, at guidance {scale:g}{beside}:",
        labels,
        [_told(one.find("letters", guidance=scale)) for one in results],
        percent,
    )


def nearest_guidance(results: Sequence[Result]) -> float | None:
    """Of the scales at which every model's clipping was measured, the one nearest to `LOOKED_AT`."""
    scales = [{float(row.at["guidance"]) for row in one.measures if row.name == "clipped"} for one in results]
    return min(sorted(set.intersection(*scales)), key=lambda scale: abs(scale - LOOKED_AT), default=None)


def _steps(results: Sequence[Result], labels: Sequence[str]) -> Iterator[str]:
    counts = [min(one.settings.get("steps") or [0]) for one in results]
    if len(set(counts)) > 1 or not counts[0]:
        return
    own = [float(one.settings.get("own_guidance", 1.0)) for one in results]
    found = [
        _told(one.find("accuracy", steps=counts[0], guidance=scale, what="all"), f"at guidance {scale:g}")
        for one, scale in zip(results, own, strict=True)
    ]
    yield _sentence(
        "Few steps.",
        f"Share of right pictures in only {counted(counts[0], 'step')}, what distilled models are made for:",
        labels,
        found,
        percent,
    )


def _velocity(results: Sequence[Result], labels: Sequence[str]) -> Iterator[str]:
    slopes = [_by_sigma(one, "slope") for one in results]
    if all(slopes):
        worst = [max(rows, key=lambda row: abs(row.value - 1)) for rows in slopes]
        yield _sentence(
            "Calibration.",
            "Shown a noisy picture and asked which way is clean, a free model's answer is neither too strong nor too "
            "weak: 1. Below 1 it exaggerates. Where each is furthest off:",
            labels,
            [_told(row, f"at noise level {row.at['sigma']:g}") for row in worst],
            _two,
        )
    losses = [_by_sigma(one, "loss") for one in results]
    if all(losses):
        doubtful = any(one.remark or (one.trained is not None and not one.trained.complete) for one in results)
        measured = "the measured pictures" if doubtful else "pictures that were kept out of training"
        yield _sentence(
            "Error.",
            f"The mean over all noise levels on {measured} (less is better):",
            labels,
            [_mean(rows) for rows in losses],
            _three,
        )


def _by_sigma(result: Result, name: str) -> list[Measure]:
    rows = [row for row in result.measures if row.name == name and row.subset == "all"]
    return [row for row in rows if row.at.get("text") == "caption" and np.isfinite(row.value)]


def _mean(rows: Sequence[Measure]) -> Told:
    replicates = np.mean([row.replicates for row in rows], axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(np.mean([row.value for row in rows])), float(low), float(high), ""


def _diversity(results: Sequence[Result], labels: Sequence[str]) -> Iterator[str]:
    for kind in ("features", "latents"):
        found = [_told(one.find("diversity", guidance=1.0, kind=kind)) for one in results]
        if all(found):
            intro = "How far pictures of one prompt from different seeds are apart, without guidance:"
            yield _sentence("Variety.", intro, labels, found, _two)
            return


def _freedom(rows: Sequence[FreedomRow]) -> Iterator[str]:
    named = {"loss": "error on the measured pictures", "slope": "calibration", "accuracy": "right pictures"}
    parts = []
    for row in rows:
        whole = row.subset == "all" and row.verdict == "gap"
        if row.name in ("loss", "slope"):
            chosen = row.at.get("sigma") == "all" and row.at.get("text") == "caption"
        else:
            chosen = row.name == "accuracy" and dict(row.at) == {"guidance": LOOKED_AT, "what": "all"}
        if whole and chosen:
            star = "*" if row.snapped else ""
            told = f"{100 * row.share:.0f}&nbsp;%</b> [{100 * row.low:.0f}, {100 * row.high:.0f}{star}]"
            where = f" at guidance {LOOKED_AT:g}" if row.name == "accuracy" else ""
            parts.append(f"<b>{told} by {named[row.name]}{where}")
    if parts:
        intro = "Of the way from the distilled model to the reference, so much has been made good:"
        yield f"<b>Freedom.</b> {intro} {'; '.join(parts)}."


def _told(row: Measure | None, remark: str = "") -> Told | None:
    return None if row is None or not np.isfinite(row.value) else (row.value, row.low, row.high, remark)


def _sentence(
    lead: str, intro: str, labels: Sequence[str], found: Sequence[Told | None], write: Callable[[float], str]
) -> str:
    parts = []
    for label, told in zip(labels, found, strict=True):
        if told is None:
            return ""
        value, low, high, remark = told
        more = f" {remark}" if remark else ""
        interval = f'<span class="faint">[{write(low)}, {write(high)}]</span>'
        parts.append(f"{escape(label)} <b>{write(value)}</b>{escape(more)} {interval}")
    return f"<b>{escape(lead)}</b> {escape(intro)} {', '.join(parts)}."


def percent(value: float) -> str:
    """0.312 → "31 %", 0.0123 → "1.2 %", with a space that does not break."""
    return f"{100 * value:.0f}\u00a0%" if abs(value) >= 0.1 or value == 0 else f"{100 * value:.1f}\u00a0%"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3f}"

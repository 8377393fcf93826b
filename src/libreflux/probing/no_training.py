"""How much of a distillation is undone with no training at all: the distilled model at a lower guidance, or scaled.

Two controls. One is the distilled model drawn at a guidance w of at most 1, v_u + w (v_c − v_u): a student that was
regressed on a guided teacher is nearly undone by it. The other multiplies its velocity by a number k(sigma) at each
noise level. What they need is chosen on one half of the pictures, by the loss, and measured on the other half. Both are
counted from numbers that a probe keeps of each picture: nothing runs through the model again. Only for what is measured
of drawn pictures the distilled model draws anew, at g w where the others draw at g.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from libreflux import seeding
from libreflux.probing.freedom import FreedomRow, freedom
from libreflux.probing.metrics.measures import Moments
from libreflux.probing.results import Coordinate, Measure, Result
from libreflux.probing.sections.velocity_metrics import measures_of
from libreflux.probing.settings import Settings

LEAST = 4
"""Pictures below which there are no two halves."""
Kind = Literal["w", "k"]
KINDS: tuple[Kind, ...] = ("w", "k")
COUNTED = ("loss", "slope", "prompt_gain", "guidance_response")
DRAWN_DIGITS = 3
"""Of w as pictures are drawn with it: its last bits would draw all of them again."""


@dataclass(frozen=True, eq=False)
class PictureMoments:
    """What N pictures at S noise levels say of a model's velocities v_c (under the caption) and v_u (without).

    Attributes:
        caption, empty: of v_c and of v_u.
        response: [N, S], mean of (v_c − v_u)² over each picture's numbers.
    """

    caption: Moments
    empty: Moments
    response: np.ndarray

    def __len__(self) -> int:
        return len(self.response)

    @staticmethod
    def of(result: Result) -> PictureMoments | None:
        """Of a probe's result, None for one of an older version, which kept no numbers of each picture."""
        sigmas = [float(row.at["sigma"]) for row in result.measures if _is_loss(row)]
        caption, empty = (_moments(result, sigmas, text) for text in ("caption", "empty"))
        response = [result.find("guidance_response", sigma=sigma) for sigma in sigmas]
        columns = [row.units.arrays()[0] for row in response if row is not None and row.units is not None]
        if caption is None or empty is None or len(columns) < len(sigmas):
            return None
        return PictureMoments(caption, empty, np.stack(columns, axis=1))

    def rows(self, chosen: np.ndarray) -> PictureMoments:
        """Those of some pictures."""
        return PictureMoments(_rows(self.caption, chosen), _rows(self.empty, chosen), self.response[chosen])

    def guided(self, w: float) -> PictureMoments:
        """Of v_u + w (v_c − v_u) in the place of v_c; without a prompt there is nothing to guide."""
        c, u = self.caption, self.empty
        along = (c.power - u.power - self.response) / 2  # ⟨v_c − v_u, v_u⟩
        aimed = c.cross - u.cross  # ⟨v_c − v_u, v⟩
        error = u.error + 2 * w * (along - aimed) + w**2 * self.response
        power = u.power + 2 * w * along + w**2 * self.response
        guided = Moments(c.sigmas, error, u.cross + w * aimed, power)
        return PictureMoments(guided, u, w**2 * self.response)

    def scaled(self, k: np.ndarray) -> PictureMoments:
        """Of k(sigma) v in the place of v, with and without a prompt; k is [S]."""
        return PictureMoments(_scaled(self.caption, k), _scaled(self.empty, k), k**2 * self.response)

    def best_w(self) -> float:
        """The w in [0, 1] of the least loss over all pictures and noise levels: ⟨d, v − v_u⟩ / ⟨d, d⟩, d = v_c − v_u.

        The loss is a square in w, so that this is its least-squares solution; 1 where the prompt changes nothing.
        """
        c, u = self.caption, self.empty
        wanted = (c.cross - u.cross - (c.power - u.power - self.response) / 2).sum()
        total = float(self.response.sum())
        return float(np.clip(wanted / total, 0.0, 1.0)) if total > 0 else 1.0

    def best_k(self) -> np.ndarray:
        """[S]: at each noise level the factor of the least loss, ⟨v_c, v⟩ / ⟨v_c, v_c⟩; 1 where v_c is 0."""
        cross, power = self.caption.cross.sum(axis=0), self.caption.power.sum(axis=0)
        found: np.ndarray = np.divide(cross, power, out=np.ones_like(cross), where=power > 0)
        return found

    def measures(self, seed: int) -> list[Measure]:
        """`COUNTED`, as a probe has them."""
        everyone = {"all": np.arange(len(self))}
        nothing = np.zeros_like(self.response)
        found = measures_of(self.caption, self.empty, self.response, nothing, everyone, Settings(seed=seed))
        return [row for row in found if row.name in COUNTED]


@dataclass(frozen=True, kw_only=True)
class ControlRow:
    """What one control closes of the distance from the distilled model to the reference, beside what training did.

    Attributes:
        kind: "w" or "k".
        control: of the control, in the freed model's place.
        freed: of the freed model on the same pictures; None where it has no such row.
    """

    kind: Kind
    control: FreedomRow
    freed: FreedomRow | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        freed = None if self.freed is None else self.freed.as_json()
        return {"kind": self.kind, "control": self.control.as_json(), "freed": freed}


@dataclass(frozen=True, kw_only=True)
class NoTraining:
    """Both controls of a comparison.

    Attributes:
        w: the guidance of the least loss.
        k: noise level to factor.
        chosen_on, measured_on: how many pictures.
        rows: what they close on the pictures that chose nothing.
    """

    w: float
    k: Mapping[float, float]
    chosen_on: int
    measured_on: int
    rows: Sequence[ControlRow]

    @property
    def drawn_w(self) -> float:
        """w as pictures are drawn with it."""
        return round(self.w, DRAWN_DIGITS)

    def with_drawn(
        self, control: Result, freed: Result, distilled: Result, reference: Result | None = None
    ) -> NoTraining:
        """The same with what the control by w closes in drawn pictures.

        Args:
            control: what was measured of the distilled model's pictures at `drawn_w`, and nothing else.
            freed, distilled, reference: as of `no_training`.
        """
        others = [one for one in (distilled, reference) if one is not None]
        trained = {_key(row): row for row in freedom(freed, *others)}
        drawn = [row for row in freedom(control, *others) if row.name not in COUNTED]
        added = [ControlRow(kind="w", control=row, freed=trained.get(_key(row))) for row in drawn]
        return dataclasses.replace(self, rows=[*self.rows, *added])

    def find(self, row: FreedomRow, kind: Kind) -> ControlRow | None:
        """Of the same measure at the same place."""
        here = (row.name, dict(row.at), row.subset)
        rows = (one for one in self.rows if one.kind == kind)
        return next((one for one in rows if (one.control.name, dict(one.control.at), one.control.subset) == here), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "w": self.w,
            "k": [{"sigma": sigma, "k": value} for sigma, value in self.k.items()],
            "chosen_on": self.chosen_on,
            "measured_on": self.measured_on,
            "rows": [row.as_json() for row in self.rows],
        }


def no_training(freed: Result, distilled: Result, reference: Result | None = None) -> NoTraining | None:
    """Both controls, chosen on one half of the held-out pictures and measured on the other.

    Args:
        freed, distilled, reference: as of `freedom.freedom`, measured alike.

    Returns:
        None where a result is of an older version, or there are fewer than `LEAST` pictures.
    """
    given = [freed, distilled, *([] if reference is None else [reference])]
    found = [PictureMoments.of(one) for one in given]
    names = distilled.names.get("pictures", ())
    whole = [one for one in found if one is not None]
    if len(whole) < len(given) or len({len(one) for one in whole}) > 1 or len(names) != len(whole[0]):
        return None
    if len(names) < LEAST:
        return None
    seed = int(distilled.settings.get("seed") or 0)
    choosing, measuring = halves(names, seed)
    model = whole[1].rows(choosing)
    w, k = model.best_w(), model.best_k()
    left = [
        dataclasses.replace(one, measures=each.rows(measuring).measures(seed))
        for one, each in zip(given, whole, strict=True)
    ]
    trained = {_key(row): row for row in freedom(left[0], *left[1:])}
    rows = list[ControlRow]()
    half = whole[1].rows(measuring)
    controls: tuple[tuple[Kind, PictureMoments], ...] = (("w", half.guided(w)), ("k", half.scaled(k)))
    for kind, controlled in controls:
        control = dataclasses.replace(left[1], measures=controlled.measures(seed))
        closed = freedom(control, *left[1:])
        told = [row for row in closed if kind == "k" or row.at.get("text") != "empty"]
        rows += [ControlRow(kind=kind, control=row, freed=trained.get(_key(row))) for row in told]
    by_sigma = dict(zip(model.caption.sigmas, k.tolist(), strict=True))
    return NoTraining(w=w, k=by_sigma, chosen_on=len(choosing), measured_on=len(measuring), rows=rows)


def halves(names: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(choosing, measuring): the numbers of these pictures, drawn by (seed, picture); nothing else moves one.

    The smaller half chooses.
    """
    drawn = [seeding.key(seed, "choosing", name) for name in names]
    order = np.array(sorted(range(len(names)), key=lambda row: (drawn[row], names[row])), np.int64)
    cut = len(names) // 2
    return np.sort(order[:cut]), np.sort(order[cut:])


def _moments(result: Result, sigmas: Sequence[float], text: str) -> Moments | None:
    errors, crosses, powers = [], [], []
    for sigma in sigmas:
        loss, slope = (result.find(name, sigma=sigma, text=text) for name in ("loss", "slope"))
        if loss is None or slope is None or loss.units is None or slope.units is None:
            return None
        cross, power = slope.units.arrays()
        errors.append(loss.units.arrays()[0])
        crosses.append(cross)
        powers.append(power)
    if not errors:
        return None
    return Moments(tuple(sigmas), *(np.stack(columns, axis=1) for columns in (errors, crosses, powers)))


def _is_loss(row: Measure) -> bool:
    return row.name == "loss" and row.subset == "all" and row.at.get("text") == "caption"


def _rows(found: Moments, chosen: np.ndarray) -> Moments:
    return Moments(found.sigmas, found.error[chosen], found.cross[chosen], found.power[chosen])


def _scaled(found: Moments, k: np.ndarray) -> Moments:
    target = found.error - found.power + 2 * found.cross  # ⟨v, v⟩
    return Moments(found.sigmas, target - 2 * k * found.cross + k**2 * found.power, k * found.cross, k**2 * found.power)


def _key(row: FreedomRow) -> tuple[str, tuple[tuple[str, Coordinate], ...], str]:
    return row.name, tuple(row.at.items()), row.subset

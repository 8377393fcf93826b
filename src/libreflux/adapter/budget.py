"""A number of parameters spent on layers in the shares of a measure: a LoKr factor for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from libreflux.adapter.factors import lokr_shapes
from libreflux.adapter.targets import Target, group, summary
from libreflux.errors import OptionError

TOLERANCE = 0.02
"""Of the budget: how far the sum of the chosen layers may be from it."""
LARGEST_FACTOR = 64
_ROUNDS = 10_000


@dataclass(frozen=True)
class Choice:
    """One size that a layer's LoKr may have; `factor` None leaves the layer out."""

    parameters: int
    factor: int | None


@dataclass(frozen=True)
class Spent:
    """A budget that is spent.

    Attributes:
        factors: layer -> LoKr factor, in the model's order; layers that get nothing are left out.
        parameters: of all together.
    """

    factors: dict[str, int]
    parameters: int


def spend(shapes: Sequence[tuple[str, int, int]], shares: Mapping[str, float], budget: int) -> Spent:
    """Gives each layer the part of a budget that it has of a measure, at most its own size, as nearly as factors allow.

    What a layer cannot take because it is full goes to the others, in the same shares. Then factors are rounded, and
    those changed again that cost least to change, until the sum is within `TOLERANCE` of the budget.

    Args:
        shapes: (name, in_features, out_features) of the model's linears.
        shares: layer -> its measure, >= 0, in any unit; what is not named, or 0, gets nothing.
        budget: parameters of the whole adapter.

    Raises:
        OptionError: more than the layers hold, less than the smallest LoKr, or a sum that no choice of factors comes
            near to.
    """
    choices = _measured(shapes, shares)
    _check_limits(choices, budget)
    wanted = _filled({name: (shares[name], each[-1].parameters) for name, each in choices.items()}, budget)
    chosen = {name: _nearest(choices[name], wanted[name]) for name in choices}
    _correct(choices, chosen, wanted, budget)
    total = _total(choices, chosen)
    if abs(total - budget) > TOLERANCE * budget:
        told = f"no factors come within {TOLERANCE:.0%} of {budget:,} parameters; the nearest found is {total:,}"
        raise OptionError(told, "budget", hint=f"use {total:,}")
    picked = {name: choices[name][at].factor for name, at in chosen.items()}
    return Spent({name: factor for name, factor in picked.items() if factor is not None}, total)


def check_budget(shapes: Sequence[tuple[str, int, int]], budget: int) -> None:
    """Raises OptionError for a budget that no measure of these layers could spend; see `spend`."""
    _check_limits(_measured(shapes, {name: 1.0 for name, _, _ in shapes}), budget)


def as_targets(factors: Mapping[str, int]) -> list[Target]:
    """Rows of a recipe's `adapter.targets`: like layers of several blocks with one factor share a pattern."""
    alike: dict[tuple[str, int], list[str]] = {}
    for name, factor in factors.items():
        alike.setdefault((group(name), factor), []).append(name)
    return [Target(layers=summary(names), factor=factor) for (_, factor), names in alike.items()]


def as_yaml(targets: Sequence[Target], heading: Sequence[str] = ()) -> str:
    """The `adapter` section of a recipe, under lines of comment."""
    rows = [f'    - {{layers: "{one.layers}", factor: {one.factor}}}' for one in targets]
    return "\n".join([*(f"# {line}" for line in heading), "adapter:", "  kind: lokr", "  targets:", *rows, ""])


def _measured(shapes: Sequence[tuple[str, int, int]], shares: Mapping[str, float]) -> dict[str, list[Choice]]:
    return {name: _choices(inner, outer) for name, inner, outer in shapes if shares.get(name, 0) > 0}


def _check_limits(choices: Mapping[str, Sequence[Choice]], budget: int) -> None:
    if not choices:
        raise OptionError("no layer has any of the measure", "budget", hint="choose another measure")
    most = sum(each[-1].parameters for each in choices.values())
    least = min(each[1].parameters for each in choices.values())
    if budget > most * (1 + TOLERANCE):
        told = f"{budget:,} parameters are more than the {most:,} of these layers at factor 1"
        raise OptionError(told, "budget", hint=f"use at most {most:,}")
    if budget < least * (1 - TOLERANCE):
        told = f"{budget:,} parameters are fewer than the smallest LoKr here has, {least:,}"
        raise OptionError(told, "budget", hint=f"use at least {least:,}")


def _choices(in_features: int, out_features: int) -> list[Choice]:
    """Every size, from none to the whole layer; a larger factor that saves nothing is none of them."""
    found: list[Choice] = []
    for factor in range(1, min(LARGEST_FACTOR, max(in_features, out_features)) + 1):
        w1, w2 = lokr_shapes(in_features, out_features, factor)
        size = math.prod(w1) + math.prod(w2)
        if not found or size < found[-1].parameters:
            found.append(Choice(size, factor))
    return [Choice(0, None), *reversed(found)]


def _filled(layers: Mapping[str, tuple[float, int]], budget: float) -> dict[str, float]:
    """Shares of a budget, none above its layer's size; layers are (share, size)."""
    wanted: dict[str, float] = {}
    rest = dict(layers)
    while rest:
        per_share = (budget - sum(wanted.values())) / sum(share for share, _ in rest.values())
        full = {name: float(size) for name, (share, size) in rest.items() if share * per_share >= size}
        if not full:
            return wanted | {name: share * per_share for name, (share, _) in rest.items()}
        wanted |= full
        rest = {name: row for name, row in rest.items() if name not in full}
    return wanted


def _off(choice: Choice, wanted: float, smallest: int) -> float:
    """How far a size is from the wished one, as a ratio's logarithm; nothing counts as half of the smallest."""
    return abs(math.log((choice.parameters or smallest / 2) / max(wanted, 1e-9)))


def _nearest(choices: Sequence[Choice], wanted: float) -> int:
    if wanted < choices[1].parameters / 2:
        return 0
    return min(range(len(choices)), key=lambda at: _off(choices[at], wanted, choices[1].parameters))


def _total(choices: Mapping[str, Sequence[Choice]], chosen: Mapping[str, int]) -> int:
    return sum(choices[name][at].parameters for name, at in chosen.items())


def _correct(
    choices: Mapping[str, Sequence[Choice]], chosen: dict[str, int], wanted: Mapping[str, float], budget: int
) -> None:
    """Changes single layers by one size, in place, until the sum is near the budget or no change brings it nearer."""
    for _ in range(_ROUNDS):
        lacking = budget - _total(choices, chosen)
        if abs(lacking) <= TOLERANCE / 4 * budget:
            return
        step = 1 if lacking > 0 else -1
        moves = list(_moves(choices, chosen, wanted, step))
        within = [move for move in moves if abs(move[1]) <= abs(lacking) + TOLERANCE / 4 * budget]
        nearer = [move for move in moves if abs(lacking - move[1]) < abs(lacking)]
        if within:
            _, _, name = min(within)
        elif nearer:
            name = min(nearer, key=lambda move: abs(lacking - move[1]))[2]
        else:
            return
        chosen[name] += step


def _moves(
    choices: Mapping[str, Sequence[Choice]], chosen: Mapping[str, int], wanted: Mapping[str, float], step: int
) -> Iterator[tuple[float, int, str]]:
    """(what it costs in nearness to the wish, parameters that it adds, layer) of each layer's next size."""
    for name, at in chosen.items():
        rows = choices[name]
        if 0 <= at + step < len(rows):
            smallest = rows[1].parameters
            cost = _off(rows[at + step], wanted[name], smallest) - _off(rows[at], wanted[name], smallest)
            yield cost, rows[at + step].parameters - rows[at].parameters, name

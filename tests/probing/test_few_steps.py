"""Shares of kept and learnt against sets of features whose distances are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from libreflux.probing.few_steps import Ends, Pictures, Point, halves, point, stop
from libreflux.probing.judges import Judge
from libreflux.probing.results import Measure
from libreflux.probing.seen import Seen, sharpness
from libreflux.probing.shares import Share, share_of_way
from libreflux.probing.subjects import ParsedPrompt

COUNT, SIZE = 40, 6
JUDGE = Judge({"subject": ["fox", "owl"]})
PROMPTS = [ParsedPrompt(f"a fox {row}", {"subject": "fox"}) for row in range(COUNT)]


def seen(seed: int, shift: float = 0.0, sharp: float = 1.0, right: int = COUNT) -> Seen:
    """Normal features around `shift`, of which the first `right` pictures show a fox."""
    random = torch.Generator().manual_seed(seed)
    logs = torch.full((COUNT, 2), -3.0)
    logs[torch.arange(COUNT), (torch.arange(COUNT) >= right).long()] = -0.1
    return Seen(
        torch.randn(COUNT, SIZE, generator=random) + shift,
        torch.full((COUNT,), sharp, dtype=torch.float64) + 0.01 * torch.rand(COUNT, generator=random).double(),
        {"subject": logs},
    )


@pytest.fixture(scope="module")
def ends() -> Ends:
    distilled = Pictures(seen(1), seen(2), (seen(2), seen(3, 0.5)))
    return Ends(seen(5, 2.0), distilled, seen(6), seen(7, 3.0, sharp=0.2, right=2), PROMPTS, JUDGE)


def share(by: str, shares: tuple[Share, ...]) -> Share:
    return next(one for one in shares if one.by == by)


def test_the_unchanged_model_has_kept_all_and_learnt_nothing_exactly(ends: Ends) -> None:
    found = point("same", None, ends.distilled, ends)
    assert found.unchanged
    assert {(one.value, one.low, one.high) for one in found.kept} == {(1.0, 1.0, 1.0)}
    assert {(one.value, one.low, one.high) for one in found.learnt} == {(0.0, 0.0, 0.0)}
    assert found.sentence == "few-step ability kept: 100 % [100, 100]; learnt: 0 % [0, 0]"
    assert found.guidance is not None
    assert found.guidance[0].value == found.guidance[1].value


def test_the_unchanged_model_is_told_so_even_where_nothing_is_broken(ends: Ends) -> None:
    assert ends.distilled.new is not None
    nothing = dataclasses.replace(ends, broken=ends.distilled.others, new=ends.distilled.new)
    assert point("same", None, ends.distilled, nothing).sentence.startswith("few-step ability kept: 100 %")


def test_either_share_is_exact_where_its_own_pictures_are_unchanged(ends: Ends) -> None:
    nothing = dataclasses.replace(ends, broken=ends.distilled.others)
    called = point("called", None, Pictures(seen(8, 1.0), ends.distilled.others), nothing)
    assert called.leading[0].text == "100 % [100, 100]"
    assert 0 < called.leading[1].value < 1
    assert not called.unchanged
    assert ends.distilled.new is not None
    other = point("other", None, Pictures(ends.distilled.new, seen(9, 1.0)), ends)
    assert other.leading[1].text == "0 % [0, 0]"
    assert point("broken", None, Pictures(seen(8), ends.broken), ends).leading[0].text == "0 % [0, 0]"


def test_a_judge_that_cannot_read_the_new_pictures_is_told(ends: Ends) -> None:
    assert ends.ceiling is None
    assert not ends.is_blind
    sees = dataclasses.replace(ends, captions=PROMPTS)
    assert sees.ceiling is not None
    assert (sees.ceiling.value, sees.is_blind) == (1.0, False)
    blind = dataclasses.replace(ends, new=seen(5, 2.0, right=3), captions=PROMPTS)
    assert blind.ceiling is not None
    assert blind.ceiling.value == pytest.approx(3 / COUNT)
    assert blind.is_blind
    more = [ParsedPrompt(one.text, {**one.named, "size": "small"}) for one in PROMPTS]
    asked_more = dataclasses.replace(ends, captions=more)
    assert asked_more.ceiling is not None
    assert asked_more.ceiling.value == 1.0  # no prompt names a size


def test_the_broken_model_has_kept_nothing_and_the_new_pictures_are_learnt(ends: Ends) -> None:
    found = point("broken", 3, Pictures(ends.new, ends.broken), ends)
    assert {one.by for one in found.kept} == {"accuracy", "picture distance", "FD", "KD", "sharpness"}
    assert all(one.value == pytest.approx(0, abs=1e-9) for one in found.kept)
    assert all(one.value == pytest.approx(1, abs=1e-9) for one in found.learnt)
    assert found.guidance is None


def test_half_of_the_way_by_what_is_linear_and_the_lowest_leads(ends: Ends) -> None:
    half = point("half", 2, Pictures(seen(8, 1.0), seen(9, 0.0, sharp=0.6, right=36)), ends)
    assert share("sharpness", half.kept).value == pytest.approx(0.5, abs=0.02)
    assert share("accuracy", half.kept).value == pytest.approx(1 - 4 / 38)
    assert share("KD", half.kept).value > 0.9  # another seed of the same law
    assert half.leading[0].by == "sharpness"
    assert half.leading[0].low < half.leading[0].value < half.leading[0].high
    assert 0 < half.leading[1].value < 1


def test_what_cannot_be_told_apart_is_too_noisy_and_comes_last(ends: Ends) -> None:
    alike = dataclasses.replace(ends, broken=seen(10, sharp=0.2))
    found = point("x", 1, Pictures(seen(8, 1.0), seen(9, sharp=0.9)), alike)
    assert share("accuracy", found.kept).text == "too noisy"
    assert np.isnan(share("accuracy", found.kept).value)
    assert found.leading[0].by == "sharpness"
    assert [one.noisy for one in found.kept] == sorted(one.noisy for one in found.kept)
    assert share("accuracy", found.kept).as_json()["value"] is None


def test_a_share_has_paired_replicates() -> None:
    noise = np.random.default_rng(0).normal(size=200)
    rows = [
        Measure(name="x", at={}, subset="all", value=v, low=0, high=0, replicates=list(v + noise)) for v in (1.0, 0, 4)
    ]
    found = share_of_way("x", *rows)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert share_of_way("x", *rows, left=True).value == pytest.approx(0.75)


def first_four(whole: Seen) -> Seen:
    return Seen(whole.features[:4], whole.sharpness[:4], {name: logs[:4] for name, logs in whole.answers.items()})


def test_halves_are_halves_and_few_pictures_still_give_numbers(ends: Ends) -> None:
    assert [int(one.sum()) for one in halves(7, 0)] == [3] * 4
    assert len({tuple(one) for one in halves(30, 0)}) == 4
    assert ends.distilled.new is not None
    few, mine = first_four(ends.new), first_four(ends.distilled.new)
    small = dataclasses.replace(ends, new=few, distilled=dataclasses.replace(ends.distilled, new=mine))
    found = point("x", 1, Pictures(few, ends.broken), small)
    assert found.learnt[0].noisy or found.learnt[0].value == pytest.approx(1)


def made(step: int, kept: float, learnt: float) -> Point:
    def one(value: float) -> Share:
        noisy = bool(np.isnan(value))
        return Share(by="x", adapted=0, start=0, end=1, value=value, low=value, high=value, noisy=noisy)

    return Point(f"step {step}", step, (one(learnt),), (one(kept),), None, ())


@pytest.mark.parametrize(
    ("rows", "step", "told"),
    [
        ([(1, 1.0, 0.2), (1200, 0.93, 0.7), (3, 0.5, 0.9)], 1200, "Stop at step 1,200"),
        ([(1, 1.0, 0.2), (2, 0.95, 0.1), (3, 0.5, 0.9)], 1, "later ones keep less than 90%"),
        ([(1, 1.0, 0.2), (2, 0.95, 0.7)], 2, "it keeps 90% or more"),
        ([(1, 0.8, 0.2), (2, 0.5, 0.7)], 1, "No checkpoint keeps 90%. Step 1 keeps the most"),
        ([(1, 0.95, np.nan), (2, 0.92, np.nan)], 2, "Stop at step 2"),
        ([(1, np.nan, 0.2), (2, 0.92, 0.1)], 2, "Stop at step 2"),
        ([(1, np.nan, 0.2), (2, np.nan, 0.1)], 2, "Too noisy to tell where to stop"),
    ],
)
def test_where_to_stop(rows: list[tuple[int, float, float]], step: int, told: str) -> None:
    best, sentence = stop([made(*row) for row in rows])
    assert best.step == step
    assert told in sentence


def test_what_may_have_been_kept_is_not_told_to_be_lost() -> None:
    one = made(5, 0.85, 0.2)
    lead = dataclasses.replace(one.kept[0], low=0.7, high=0.98)
    sentence = stop([dataclasses.replace(one, kept=(lead,)), made(6, 0.5, 0.7)])[1]
    assert sentence.startswith("Of no checkpoint it is shown that it keeps 90%. Step 5 keeps the most")


def test_sharpness_of_pictures_that_are_known() -> None:
    rows = torch.arange(8)
    board = ((rows[:, None] + rows) % 2).float() * 2 - 1
    pixels = torch.stack([board.expand(3, 8, 8), torch.full((3, 8, 8), 0.3)])
    assert sharpness(pixels).tolist() == pytest.approx([4 * (36 / 35) ** 0.5, 0], abs=1e-12)

"""Controls without training on planted students: what is known to undo them is found, on other pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from libreflux import seeding
from libreflux.flow.guidance import cfg
from libreflux.flow.path import interpolate
from libreflux.probing.metrics.measures import Moments, Velocity, moments, paired_noise
from libreflux.probing.no_training import NoTraining, PictureMoments, halves, no_training
from libreflux.probing.results import Result
from libreflux.probing.sections.velocity_metrics import measures_of
from libreflux.probing.settings import Settings
from mixture import MEANS, SHARES, STDS, null, prompted

SIGMAS = (0.3, 0.7, 0.9)
PICTURES = 40
IDS = [f"{number:032x}" for number in range(PICTURES)]


@pytest.fixture(scope="module")
def mixture() -> tuple[Tensor, Velocity]:
    """(x0 [N, 1, 16, 16], the velocity that is told each number's component)."""
    random = seeding.rng(0, "planted")
    labels = torch.from_numpy((random.random((PICTURES, 1, 16, 16)) < SHARES[1]).astype(np.int64))
    mean, std = torch.tensor(MEANS, dtype=torch.float64)[labels], torch.tensor(STDS, dtype=torch.float64)[labels]
    return mean + std * torch.from_numpy(random.standard_normal(labels.shape)), prompted(labels)


Mixture = tuple[Tensor, Velocity]


def seen(x0: Tensor, conditional: Velocity, unconditional: Velocity) -> PictureMoments:
    """As a probe sees a model of these two velocities."""
    caption, empty = (moments(field, x0, IDS, SIGMAS) for field in (conditional, unconditional))
    columns = []
    for sigma in SIGMAS:
        noise = torch.stack([paired_noise(x0.shape[1:], 0, name, sigma) for name in IDS])
        level = torch.full((PICTURES,), sigma)
        x = interpolate(x0, noise, level)
        columns.append((conditional(x, level) - unconditional(x, level)).square().flatten(1).mean(1).numpy())
    return PictureMoments(caption, empty, np.stack(columns, axis=1))


def probed(name: str, found: PictureMoments) -> Result:
    everyone, nothing = {"all": np.arange(PICTURES)}, np.zeros_like(found.response)
    rows = measures_of(found.caption, found.empty, found.response, nothing, everyone, Settings())
    return Result(
        model={"name": name},
        settings={"seed": 0, "own_guidance": 1.0},
        versions={},
        seconds=0.0,
        measures=rows,
        names={"pictures": IDS},
    )


def student(mixture: Mixture, scale: float) -> PictureMoments:
    """A regression on the base at a guidance: linear, so that guidance 1 / scale is the base again."""
    x0, conditional = mixture
    return seen(x0, lambda x, s: cfg(conditional(x, s), null(x, s), scale), null)


def shares(found: NoTraining, kind: str) -> dict[tuple[str, object], tuple[float, str]]:
    rows = [row.control for row in found.rows if row.kind == kind and row.control.at.get("sigma") == "all"]
    return {(row.name, row.at["text"]): (row.share, row.verdict) for row in rows}


def test_a_student_of_guidance_three_is_undone_at_a_third(mixture: Mixture) -> None:
    x0, conditional = mixture
    base, distilled = seen(x0, conditional, null), student(mixture, 3.0)
    found = no_training(probed("half", student(mixture, 2.0)), probed("d", distilled), probed("b", base))
    assert found is not None
    assert found.w == pytest.approx(1 / 3, abs=0.01)
    by_w = shares(found, "w")
    assert set(by_w) == {("loss", "caption"), ("slope", "caption")}
    assert by_w["loss", "caption"][0] == pytest.approx(1, abs=0.01)
    assert by_w["slope", "caption"][0] == pytest.approx(1, abs=0.05)
    trained = next(row.freed for row in found.rows if row.control.name == "loss" and row.control.at["sigma"] == "all")
    assert trained is not None
    assert 0.3 < trained.share < 0.9
    assert (found.chosen_on, found.measured_on) == (20, 20)


def test_a_student_that_is_too_strong_is_undone_by_its_factors(mixture: Mixture) -> None:
    x0, conditional = mixture
    factors = dict(zip(SIGMAS, (1.2, 1.5, 2.0), strict=True))

    def strong(field: Velocity) -> Velocity:
        return lambda x, s: factors[round(float(s[0]), 6)] * field(x, s)

    base, distilled = seen(x0, conditional, null), seen(x0, strong(conditional), strong(null))
    found = no_training(probed("f", base), probed("d", distilled), probed("b", base))
    assert found is not None
    assert list(found.k.values()) == pytest.approx([1 / 1.2, 1 / 1.5, 1 / 2], rel=0.02)
    by_k = shares(found, "k")
    assert by_k["loss", "caption"][0] > 0.98
    assert by_k["loss", "empty"][0] > 0.98
    assert shares(found, "w")["slope", "caption"][0] < 0.9


@pytest.mark.parametrize("change", ["guided", "scaled"])
def test_moments_of_a_control_are_those_of_its_velocity(mixture: Mixture, change: str) -> None:
    x0, conditional = mixture
    found = student(mixture, 3.0)
    strong: Callable[[Tensor, Tensor], Tensor] = lambda x, s: cfg(conditional(x, s), null(x, s), 3.0)  # noqa: E731
    if change == "guided":
        ours, plain = found.guided(0.4), lambda x, s: cfg(strong(x, s), null(x, s), 0.4)
    else:
        ours, plain = found.scaled(np.full(len(SIGMAS), 0.7)), lambda x, s: 0.7 * strong(x, s)
    true: Moments = moments(plain, x0, IDS, SIGMAS)
    for name in ("error", "cross", "power"):
        np.testing.assert_allclose(getattr(ours.caption, name), getattr(true, name), rtol=1e-6)


def test_the_half_that_chooses_is_never_measured_and_other_pictures_move_none() -> None:
    choosing, measuring = halves(IDS, 0)
    assert sorted([*choosing, *measuring]) == list(range(PICTURES))
    assert abs(len(choosing) - len(measuring)) <= 1
    turned = halves(IDS[::-1], 0)[0]
    assert {IDS[::-1][row] for row in turned} == {IDS[row] for row in choosing}
    assert halves(IDS, 1)[0].tolist() != choosing.tolist()


def test_the_measured_half_alone_decides_what_is_told(mixture: Mixture) -> None:
    x0, conditional = mixture
    base, distilled = probed("b", seen(x0, conditional, null)), student(mixture, 3.0)
    choosing, _ = halves(IDS, 0)
    found = no_training(base, probed("d", distilled), base)
    worse = dataclasses.replace(distilled, response=distilled.response.copy())
    worse.response[choosing] *= 4
    other = no_training(base, probed("d", worse), base)
    assert found is not None
    assert other is not None
    assert other.w != found.w
    levels = [[row.control.distilled for row in each.rows] for each in (found, other)]
    assert levels[0] == levels[1]


def test_results_of_older_versions_have_no_controls(mixture: Mixture) -> None:
    x0, conditional = mixture
    new = probed("b", seen(x0, conditional, null))
    old = dataclasses.replace(new, measures=[dataclasses.replace(row, units=None) for row in new.measures])
    assert no_training(new, old, new) is None
    assert no_training(new, dataclasses.replace(new, names={}), new) is None

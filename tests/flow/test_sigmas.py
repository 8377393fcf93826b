from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libreflux.flow.sigmas import (
    Beta,
    Law,
    Uniform,
    Weighted,
    beta_cdf,
    beta_icdf,
    independent,
    make_law,
    stratified,
)

GRID = torch.cat([torch.linspace(0, 1, 4001, dtype=torch.float64), torch.logspace(-12, -3, 50, dtype=torch.float64)])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_beta_2_2_closed_form_inverts_its_cubic_and_agrees_with_the_numeric_inverse() -> None:
    sigma = Beta(alpha=2, beta=2).icdf(GRID)
    torch.testing.assert_close(3 * sigma**2 - 2 * sigma**3, GRID, atol=1e-14, rtol=0)
    torch.testing.assert_close(beta_icdf(GRID, 2, 2), sigma, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("a", "b"), [(2, 2), (2, 1.6), (2, 1), (1, 1), (0.5, 0.5), (0.3, 4), (5, 0.7), (30, 2), (100, 100)]
)
def test_beta_agrees_with_scipy(a: float, b: float) -> None:
    reference = scipy.stats.beta(a, b)
    torch.testing.assert_close(
        Beta(alpha=a, beta=b).icdf(GRID), torch.from_numpy(reference.ppf(GRID.numpy())), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(beta_cdf(GRID, a, b), torch.from_numpy(reference.cdf(GRID.numpy())), atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 100), st.floats(0.1, 100))
def test_beta_icdf_is_monotone_and_inverts_the_cdf(a: float, b: float) -> None:
    p = torch.linspace(0, 1, 201, dtype=torch.float64)
    sigma = Beta(alpha=a, beta=b).icdf(p)
    assert sigma[0] < 1e-15
    assert sigma[-1] > 1 - 1e-15
    assert bool((sigma.diff() >= -1e-11).all())  # below the accuracy of 1e-9
    # F can rise by more than the tolerance between neighbouring doubles (a = 0.1 near 1): ask that p lies between them.
    around = torch.tensor(1e-9, dtype=torch.float64)
    assert bool((beta_cdf((sigma - around).clamp(0, 1), a, b) <= p + 1e-9).all())
    assert bool((beta_cdf((sigma + around).clamp(0, 1), a, b) >= p - 1e-9).all())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(["uniform", "2,2", "2,1.6"]))
def test_one_draw_per_stratum(count: int, seed: int, name: str) -> None:
    laws: dict[str, tuple[Law, Callable[[Tensor], Tensor]]] = {
        "uniform": (Uniform(), lambda s: s),
        "2,2": (Beta(), lambda s: beta_cdf(s, 2, 2)),
        "2,1.6": (Beta(alpha=2, beta=1.6), lambda s: beta_cdf(s, 2, 1.6)),
    }
    law, cdf = laws[name]
    sigmas = stratified(law, count, seeded(seed))
    assert sigmas.shape == (count,)
    assert sigmas.dtype == torch.float32
    places = cdf(sigmas.double()).sort().values * count
    strata = torch.arange(count)
    # sigma was rounded to fp32: allow that much at a stratum's edge.
    assert bool((places > strata - 1e-4).all() and (places < strata + 1 + 1e-4).all())


def test_weighted_values_are_drawn_by_their_weights() -> None:
    law = Weighted([1.0, 0.6, 0.3], [2, 1, 1])
    assert law.icdf(torch.tensor([0.0, 0.2, 0.26, 0.49, 0.51, 1.0])).tolist() == [0.3, 0.3, 0.6, 0.6, 1.0, 1.0]
    assert law.cdf(torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])).tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]


beta, normal, logit = scipy.stats.beta(2, 2).cdf, scipy.stats.norm.cdf, scipy.special.logit
EXACT: dict[str, tuple[Law, Callable[[np.ndarray], np.ndarray]]] = {
    "logit-normal": (make_law("logit-normal", mean=-0.5, std=0.7), lambda s: normal((logit(s) + 0.5) / 0.7)),
    "shifted": (make_law("beta", shift=3.0), lambda s: beta(s / (3 - 2 * s))),
    "floored": (make_law("beta", uniform_floor=0.3), lambda s: 0.7 * beta(s) + 0.3 * s),
    "all": (
        make_law("logit-normal", shift=2.0, uniform_floor=0.1),
        lambda s: 0.9 * normal(logit(s / (2 - s))) + 0.1 * s,
    ),
}
"""Laws, each with its marginal written with scipy alone."""


@pytest.mark.parametrize("name", EXACT)
def test_further_laws_have_their_exact_marginal_and_one_draw_per_stratum(name: str) -> None:
    law, cdf = EXACT[name]
    torch.testing.assert_close(torch.from_numpy(cdf(law.icdf(GRID).numpy())), GRID, atol=1e-11, rtol=0)
    inner = torch.linspace(0, 1, 501, dtype=torch.float64)
    torch.testing.assert_close(law.cdf(inner), torch.from_numpy(cdf(inner.numpy())), atol=1e-12, rtol=0)
    pooled = torch.stack([stratified(law, 7, seeded(step)) for step in range(300)]).double().numpy()
    assert (np.sort(np.floor(cdf(pooled) * 7), axis=1) == np.arange(7)).all()
    assert scipy.stats.kstest(pooled.ravel(), cdf).statistic < 0.02
    assert scipy.stats.kstest(pooled.ravel(), scipy.stats.beta(2, 2).cdf).statistic > 0.03
    assert scipy.stats.kstest(pooled[:, 0], cdf).pvalue > 1e-4
    loose = independent(law, 2000, seeded(1)).double().numpy()
    assert scipy.stats.kstest(loose, cdf).pvalue > 1e-4


def test_a_floor_trains_the_rare_ends() -> None:
    """Chroma's timestep density 2 - 7.7 (t - 1/2)^2 is 0.945 Beta(2, 2) + 0.055 uniform, within 0.1 %."""
    law = make_law("beta", uniform_floor=0.055)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    cubic = 2 * t - 7.7 / 3 * ((t - 0.5) ** 3 + 0.125)
    torch.testing.assert_close(law.cdf(t), cubic / cubic[-1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("b", [2.0, 1.6])
def test_pooled_strata_follow_the_law(b: float) -> None:
    law = Beta(alpha=2, beta=b)
    pooled = torch.cat([stratified(law, 7, seeded(step)) for step in range(400)]).double().numpy()
    distance = scipy.stats.kstest(pooled, scipy.stats.beta(2, b).cdf).statistic
    # 2,800 independent draws stay below 0.037 with probability 0.999; strata do better.
    assert distance < 0.02
    wrong = scipy.stats.kstest(pooled, scipy.stats.beta(2, 3.6 - b).cdf).statistic
    assert wrong > 0.05


def original_strata(law: Law, count: int, generator: torch.Generator) -> torch.Tensor:
    """As published: slot i, which is rank i's, draws from the i-th stratum in every step."""
    return law.icdf((torch.arange(count) + torch.rand(count, generator=generator)).double() / count).float()


def test_each_slot_alone_follows_the_law_where_the_originals_is_bound_to_its_band() -> None:
    for draw, follows in ((stratified, True), (original_strata, False)):
        steps = torch.stack([draw(Beta(), 7, seeded(step)) for step in range(1500)]).double().numpy()
        for rank in range(7):
            assert (scipy.stats.kstest(steps[:, rank], scipy.stats.beta(2, 2).cdf).pvalue > 1e-4) == follows
        assert (abs(steps.mean(axis=0) - 0.5).max() < 5 * 0.224 / np.sqrt(1500)) == follows


def test_strata_have_less_variance_than_independent_draws() -> None:
    """The mean of sigma^2 over 40 draws: strata leave 1e-3 to 9e-3 of its variance."""
    means = {
        draw: torch.stack([draw(Beta(), 40, seeded(s)).square().mean() for s in range(400)]).var().item()
        for draw in (stratified, independent)
    }
    assert means[stratified] < 0.02 * means[independent]


def test_independent_draws_follow_the_law() -> None:
    draws = independent(Beta(alpha=2, beta=1.6), 5000, seeded(1)).double().numpy()
    assert scipy.stats.kstest(draws, scipy.stats.beta(2, 1.6).cdf).pvalue > 1e-4


def test_laws_by_name_and_refusals() -> None:
    assert make_law("beta", alpha=2, beta=1.6) == Beta(alpha=2, beta=1.6)
    assert make_law("uniform") == Uniform()
    with pytest.raises(ValueError, match="known: beta, logit-normal, uniform"):
        make_law("betta")
    with pytest.raises(ValueError, match="alpha is 0"):
        Beta(alpha=0)
    for wrong in ({"shift": 0.0}, {"uniform_floor": 1.5}, {"std": 0.0}, {"mean": 99.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong)).replace('_', ' ')} is"):
            make_law("logit-normal", **wrong)

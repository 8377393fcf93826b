"""Training laws of sigma, drawn through their inverse distribution functions in shuffled strata.

A law is its CDF and the inverse of that. One optimizer step uses count = world x batch x accumulate sigmas: the unit
interval is cut into that many strata, each gives exactly one draw, and a permutation shared by all ranks deals them to
slots, so that no rank and no picture is tied to one noise band (dealt in order over 7 ranks, rank 0 averages sigma
0.155, rank 6 0.845).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from libreflux.flow.schedule import shift_sigmas


class Law(Protocol):
    """A distribution of sigma on [0, 1]."""

    def icdf(self, p: Tensor) -> Tensor:
        """Quantiles: p in [0, 1], fp64, any shape, to sigma of the same shape, fp64."""
        ...

    def cdf(self, sigma: Tensor) -> Tensor:
        """The share of draws below sigma in [0, 1]; fp64, any shape."""
        ...


@dataclass(frozen=True)
class Uniform:
    """sigma ~ U(0, 1)."""

    def cdf(self, sigma: Tensor) -> Tensor:
        """The identity. See `Law.cdf`."""
        return sigma.double()

    def icdf(self, p: Tensor) -> Tensor:
        """The identity. See `Law.icdf`."""
        return p.double()


@dataclass(frozen=True, kw_only=True)
class Beta:
    """sigma ~ Beta(alpha, beta), density proportional to sigma^(alpha-1) (1-sigma)^(beta-1); both in [0.1, 100]."""

    alpha: float = 2.0
    beta: float = 2.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0.1 <= value <= 100:
                raise ValueError(f"{name} is {value}, wanted 0.1 to 100")

    def icdf(self, p: Tensor) -> Tensor:
        """Closed form for (2, 2), else a bracketed Newton iteration, within 1e-9 of the inverse. See `Law.icdf`."""
        p = p.double()
        if (self.alpha, self.beta) == (2, 2):
            return beta_2_2_icdf(p)
        return beta_icdf(p, self.alpha, self.beta)

    def cdf(self, sigma: Tensor) -> Tensor:
        """3 s^2 - 2 s^3 for (2, 2), else `beta_cdf`. See `Law.cdf`."""
        sigma = sigma.double()
        if (self.alpha, self.beta) == (2, 2):
            return sigma.square() * (3 - 2 * sigma)
        return beta_cdf(sigma, self.alpha, self.beta)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """sigma = sigmoid(mean + std z), z ~ N(0, 1) (Esser et al. 2024, arXiv 2403.03206, eq. 19); std in [0.01, 100]."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0.01 <= self.std <= 100:
            raise ValueError(f"std is {self.std}, wanted 0.01 to 100")
        if not -20 <= self.mean <= 20:
            raise ValueError(f"mean is {self.mean}, wanted -20 to 20")

    def icdf(self, p: Tensor) -> Tensor:
        """See `Law.icdf`."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(p.double()))

    def cdf(self, sigma: Tensor) -> Tensor:
        """See `Law.cdf`."""
        return torch.special.ndtr((torch.logit(sigma.double()) - self.mean) / self.std)


@dataclass(frozen=True)
class Shifted:
    """The law of s sigma / (1 + (s - 1) sigma) for sigma ~ `law`, as `schedule.shift_sigmas`; s in [0.01, 100]."""

    law: Law
    shift: float

    def __post_init__(self) -> None:
        if not 0.01 <= self.shift <= 100:
            raise ValueError(f"shift is {self.shift}, wanted 0.01 to 100")

    def icdf(self, p: Tensor) -> Tensor:
        """See `Law.icdf`."""
        return shift_sigmas(self.law.icdf(p), self.shift)

    def cdf(self, sigma: Tensor) -> Tensor:
        """See `Law.cdf`."""
        return self.law.cdf(shift_sigmas(sigma.double(), 1 / self.shift))


@dataclass(frozen=True)
class Floored:
    """A mixture: `law` with weight 1 - floor, U(0, 1) with weight floor in [0, 1]. No band is left untrained."""

    law: Law
    floor: float

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"uniform floor is {self.floor}, wanted 0 to 1")

    def icdf(self, p: Tensor) -> Tensor:
        """The inverse of the mixture's own CDF, within 2^-46, by bisection: its strata are those of the mixture."""
        p = p.double()
        low, high = torch.zeros_like(p), torch.ones_like(p)
        for _ in range(46):
            middle = (low + high) / 2
            below = self.cdf(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(p >= 1, torch.ones_like(p), torch.where(p <= 0, torch.zeros_like(p), (low + high) / 2))

    def cdf(self, sigma: Tensor) -> Tensor:
        """See `Law.cdf`."""
        return (1 - self.floor) * self.law.cdf(sigma) + self.floor * sigma.double()


@dataclass(frozen=True)
class Weighted:
    """Some values of sigma alone, each with a probability in proportion to its weight.

    Args:
        values: in [0, 1], falling.
        weights: of each, above 0.
    """

    values: Sequence[float]
    weights: Sequence[float]

    def icdf(self, p: Tensor) -> Tensor:
        """See `Law.icdf`."""
        rising = torch.tensor(self.values, dtype=torch.float64).flip(0)
        return rising[torch.searchsorted(self._below()[:-1], p.double())]

    def cdf(self, sigma: Tensor) -> Tensor:
        """See `Law.cdf`; the share of draws up to sigma, itself included."""
        rising = torch.tensor(self.values, dtype=torch.float64).flip(0)
        shares = torch.cat([torch.zeros(1, dtype=torch.float64), self._below()])
        return shares[torch.searchsorted(rising, sigma.double(), right=True)]

    def _below(self) -> Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64).flip(0)
        return weights.cumsum(0) / weights.sum()


def beta_2_2_icdf(p: Tensor) -> Tensor:
    """The root in [0, 1] of 3 s^2 - 2 s^3 = p, by the trigonometric solution: 1/2 - sin(asin(1 - 2p) / 3)."""
    return (0.5 - torch.sin(torch.asin(1 - 2 * p) / 3)).clamp(0, 1)


def _beta_fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Continued fraction of the incomplete beta function (DLMF 8.17.22), Lentz's method; fast for x < (a+1)/(a+b+2)."""
    floor = torch.full_like(x, 1e-300)

    def guarded(value: Tensor) -> Tensor:
        return torch.where(value.abs() < floor, floor, value)

    numerator = torch.ones_like(x)
    denominator = 1 / guarded(1 - (a + b) * x / (a + 1))
    fraction = denominator
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = torch.ones_like(x)
        for term in (even, odd):
            numerator = guarded(1 + term / numerator)
            denominator = 1 / guarded(1 + term * denominator)
            change = change * numerator * denominator
        fraction = fraction * change
        if bool(((change - 1).abs() < 1e-13).all()):
            return fraction
    return fraction


def beta_cdf(x: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """The regularised incomplete beta function I_x(a, b) in fp64; x in [0, 1], any shape (DLMF 8.17.2, 8.17.4)."""
    x = x.double()
    a, b = (torch.as_tensor(value, dtype=torch.float64).expand_as(x) for value in (a, b))
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    front = torch.exp(torch.xlogy(a, x) + torch.xlogy(b, 1 - x) - log_beta)
    flip = x > (a + 1) / (a + b + 2)
    p, q, y = torch.where(flip, b, a), torch.where(flip, a, b), torch.where(flip, 1 - x, x)
    part = front * _beta_fraction(y, p, q) / p
    return torch.where(flip, 1 - part, part)


def beta_icdf(p: Tensor, alpha: float, beta: float) -> Tensor:
    """The inverse of `beta_cdf`, p in [0, 1] of any shape, fp64: Newton's method kept inside a shrinking bracket.

    Above the median the mirrored problem (1 - p, beta, alpha) is solved, so that both tails are resolved alike.
    """
    p = p.double()
    upper = p > 0.5
    target = torch.where(upper, 1 - p, p)
    end = target <= 0
    target = torch.where(end, torch.full_like(p, 0.5), target)  # solved, then thrown away: Newton crawls towards 0
    one, other = torch.full_like(p, alpha), torch.full_like(p, beta)
    a, b = torch.where(upper, other, one), torch.where(upper, one, other)
    log_beta = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    low, high = torch.zeros_like(p), torch.ones_like(p)
    x = a / (a + b)
    for _ in range(200):
        excess = beta_cdf(x, a, b) - target
        low, high = torch.where(excess < 0, x, low), torch.where(excess >= 0, x, high)
        density = torch.exp(torch.xlogy(a - 1, x) + torch.xlogy(b - 1, 1 - x) - log_beta)
        newton = x - excess / density
        following = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        moved = (following - x).abs()
        x = following
        if bool((moved <= 1e-12).all()):
            break
    x = torch.where(end, torch.zeros_like(x), x)
    return torch.where(upper, 1 - x, x)


LAWS: dict[str, Callable[..., Law]] = {"beta": Beta, "logit-normal": LogitNormal, "uniform": Uniform}


def make_law(kind: str, *, shift: float = 1.0, uniform_floor: float = 0.0, **params: float) -> Law:
    """A law by name, then shifted, then mixed with a uniform floor (which the shift leaves uniform).

    Args:
        kind: "beta" (alpha, beta), "logit-normal" (mean, std) or "uniform".
        shift: see `Shifted`; 1 is none.
        uniform_floor: see `Floored`; 0 is none.
        params: of the kind.

    Raises:
        ValueError: an unknown kind, or a value out of range.
    """
    if kind not in LAWS:
        raise ValueError(f"no sigma law {kind!r}, known: {', '.join(sorted(LAWS))}")
    law = LAWS[kind](**params)
    if shift != 1:
        law = Shifted(law, shift)
    return Floored(law, uniform_floor) if uniform_floor else law


def stratified(law: Law, count: int, generator: torch.Generator) -> Tensor:
    """`count` sigmas in slot order, one from each of `count` equally probable strata, dealt by a random permutation.

    Args:
        law: the distribution; pooled over slots the draws follow it exactly.
        count: world x batch x accumulate of one optimizer step, at least 1.
        generator: a CPU generator seeded alike on every rank, for this step alone.

    Returns:
        [count] fp32 on the CPU; `slot` says which entry belongs to whom.
    """
    stratum = torch.randperm(count, generator=generator)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    return law.icdf((stratum + within) / count).float()


def independent(law: Law, count: int, generator: torch.Generator) -> Tensor:
    """`count` independent sigmas, [count] fp32: the plain twin of `stratified`."""
    return law.icdf(torch.rand(count, generator=generator, dtype=torch.float64)).float()

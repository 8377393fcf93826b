from __future__ import annotations

import numpy as np

from libreflux import seeding


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the reference implementation seeded with 0 (Vigna, prng.di.unimi.it/splitmix64.c)."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in seeding.splitmix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_uniforms_are_uniform_independent_and_functions_of_their_key() -> None:
    count = 20_000
    index = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    draws = seeding.uniforms(3, "caption", index, np.zeros(count, int), 2)
    again = seeding.uniforms(3, "caption", index[::-1], np.zeros(count, int), 2)[::-1]
    assert (draws == again).all()
    others = [
        seeding.uniforms(4, "caption", index, np.zeros(count, int), 2),
        seeding.uniforms(3, "crop", index, np.zeros(count, int), 2),
        seeding.uniforms(3, "caption", index, np.ones(count, int), 2),
    ]
    columns = np.stack([draws[:, 0], draws[:, 1], *(other[:, 0] for other in others)])
    # Five standard errors of a correlation of 20,000 are 0.035; Kolmogorov-Smirnov beyond 1.95 / √n is 1 in 1,000.
    assert np.abs(np.corrcoef(columns) - np.eye(5)).max() < 0.035
    for column in columns:
        assert np.abs(np.sort(column) - (np.arange(count) + 0.5) / count).max() < 1.95 / count**0.5
    visits = seeding.uniforms(3, "caption", np.zeros(count, np.uint64), np.arange(count), 1)[:, 0]
    assert abs(np.corrcoef(visits[1:], visits[:-1])[0, 1]) < 0.035

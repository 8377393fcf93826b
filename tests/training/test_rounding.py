"""Rounding noise as a hash: its words, their statistics; the chunked update beside its plain twin; older states."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from libreflux import seeding
from libreflux.errors import RunError
from libreflux.training.bf16_update import Factors, Scratch, places_apart, plain_update, update
from libreflux.training.optimizer import GENERATOR, HASH, AdamWBF16
from libreflux.training.rounding import LOW, Noise

COUNT = 1 << 20


def words_by_numpy(seed: int, step: int, name: str, count: int) -> np.ndarray:
    key = seeding.key(seed, "rounding-hash", step, name)
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.int64) + (key & 0xFFFFFFFF)).astype(np.uint32).view(np.int32)
        y = ((z ^ (z >> 16)).view(np.uint32) * np.uint32(0x7FEB352D) + np.uint32(key >> 32)).view(np.int32)
        return np.asarray((y ^ (y >> 15)).view(np.uint32) * np.uint32(0x846CA68B))


def halves(seed: int, step: int, name: str) -> tuple[Tensor, Tensor]:
    words = Noise.of(seed, step, name).words(COUNT)
    return words & LOW, (words >> 16) & LOW


@pytest.mark.parametrize(("seed", "step", "name"), [(0, 1, "a"), (2**40, 20_000, "transformer_blocks.0.w"), (7, 2, "")])
def test_words_are_those_of_the_formula(seed: int, step: int, name: str) -> None:
    words = Noise.of(seed, step, name).words(5000).numpy().view(np.uint32)
    np.testing.assert_array_equal(words, words_by_numpy(seed, step, name, 5000))


def test_places_near_the_end_of_int32_wrap() -> None:
    noise = Noise(2**31 - 3, 5)
    assert noise.words(6)[3:].equal(Noise(-(2**31), 5).words(3))


def kolmogorov(half: Tensor) -> float:
    """The largest error of P(noise < L), which is the probability of rounding a number of lower half 65536 - L up."""
    below = torch.bincount(half.reshape(-1), minlength=65536).double().cumsum(0) / half.numel()
    return float((below - torch.arange(1, 65537) / 65536).abs().max())


def test_both_halves_are_uniform_over_the_places_of_a_step() -> None:
    for key in ((0, 1, "a"), (5, 999, "transformer_blocks.0.attn.to_q.lokr_w2")):
        for half in halves(*key):
            assert kolmogorov(half) < 2 * COUNT**-0.5


def test_both_halves_are_uniform_over_the_steps_of_a_place() -> None:
    words = torch.cat([Noise.of(3, step, "w").words(16) for step in range(1, 8193)])
    for half in (words & LOW, (words >> 16) & LOW):
        assert kolmogorov(half) < 2 * words.numel() ** -0.5


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def test_what_must_not_depend_on_each_other_does_not() -> None:
    """Halves, neighbours, rows of a matrix, steps, names and seeds: correlations within six standard errors of 0."""
    low, high = halves(0, 1, "a")
    pairs = [(low, high)]
    pairs += [(half[:-shift], half[shift:]) for half in (low, high) for shift in (1, 2, 64, 768, 3072, 1 << 16)]
    for other in ((0, 2, "a"), (0, 1, "b"), (1, 1, "a")):
        pairs += list(zip((low, high), halves(*other), strict=True))
    for first, second in pairs:
        assert abs(correlation(first, second)) < 6 * COUNT**-0.5


def test_a_pair_of_numbers_is_rounded_independently_over_the_steps() -> None:
    """What keys add to a hash can leave two places a constant distance apart: over 4096 steps it does not."""
    over_steps = torch.stack([Noise.of(3, step, "w").words(64) & LOW for step in range(1, 4097)])
    distance = (over_steps[:, 1:] - over_steps[:, :1]) & LOW
    spread = distance.double().std(dim=0)
    assert torch.allclose(spread, torch.full_like(spread, 65536 / 12**0.5), rtol=0.05)


def numbers(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, m, grad = (torch.randn(count, generator=generator) for _ in range(3))
    v = torch.rand(count, generator=generator) ** 8
    return p.bfloat16(), m.bfloat16(), v.bfloat16(), grad


def updated(count: int, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = numbers(count)
    factors = Factors.at(3, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    update(*found, factors=factors, noise=Noise.of(1, 3, "w"), scratch=Scratch(torch.device("cpu"), chunk))
    return found


def test_the_update_is_its_plain_twin() -> None:
    """But for a place of bf16 in one of some 10,000 numbers, where the order of roundings in fp32 decides."""
    fast, plain = updated(500_000, 1 << 16), numbers(500_000)
    factors = Factors.at(3, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    plain_update(*plain, factors=factors, noise=Noise.of(1, 3, "w"))
    assert places_apart(fast[:3], plain[:3]) < 1e-3
    assert places_apart(fast[:1], numbers(500_000)[:1]) > 0.1


def test_places_apart_tells_signs_and_neighbours() -> None:
    one = torch.tensor([1.0, -1.0, 0.0]).bfloat16()
    assert places_apart([one], [-one]) == 1.0
    assert places_apart([one], [one]) == 0.0
    above = (one.view(torch.int16) + 1).view(torch.bfloat16)
    assert places_apart([one], [above]) == 1.0  # all of them
    assert places_apart([torch.tensor([0.0]).bfloat16()], [torch.tensor([-0.0]).bfloat16()]) == 0.0


@pytest.mark.parametrize("chunk", [64, 1024, 1 << 16])
def test_chunks_change_nothing(chunk: int) -> None:
    assert all(a.equal(b) for a, b in zip(updated(50_001, chunk), updated(50_001, 1 << 20), strict=True))


KERNEL = """
import torch
from libreflux.training import bf16_kernel
print(bf16_kernel.trial("cpu"))
plain = bf16_kernel.plain_update
bf16_kernel.plain_update = lambda p, m, v, g, **others: plain(p, m, v, 1.1 * g, **others)
print(bf16_kernel.trial("cpu"))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch for CUDA on Linux")
def test_the_kernel_is_its_plain_twin_in_tritons_interpreter() -> None:
    """And the trial, which decides on a card whether it is used, tells another arithmetic from it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    right, wrong = map(float, done.stdout.split())
    assert right < 1e-3
    assert wrong == 1.0


def trained(adamw: AdamWBF16, steps: range) -> None:
    for step in steps:
        adamw.step(1e-2, torch.randn(adamw.count, generator=torch.Generator().manual_seed(step)))


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(5)
    return [(name, nn.Parameter(torch.randn(40, 9, generator=generator).bfloat16())) for name in "ab"]


def test_a_state_from_before_the_hash_goes_on_with_its_own_noise() -> None:
    whole = AdamWBF16(rows := parameters(), 0)
    whole.rounding = GENERATOR
    trained(whole, range(2))
    state = {key: value.clone() for key, value in whole.state_dict_tensors().items()}
    assert "rounding" not in state
    resumed = AdamWBF16([(name, nn.Parameter(one.detach().clone())) for name, one in rows], 0)
    resumed.load_state_tensors(state)
    for one in (whole, resumed):
        trained(one, range(2, 4))
    assert resumed.rounding == GENERATOR
    wanted = whole.state_dict_tensors()
    assert all(value.equal(wanted[key]) for key, value in resumed.state_dict_tensors().items())
    for (_, a), (_, b) in zip(whole.buckets[0].rows, resumed.buckets[0].rows, strict=True):
        assert a.equal(b)


def test_a_new_state_says_its_noise_and_an_unknown_one_is_refused() -> None:
    adamw = AdamWBF16(parameters(), 0)
    state = adamw.state_dict_tensors()
    assert int(state["rounding"]) == HASH
    with pytest.raises(RunError, match="rounding noise of kind 3"):
        adamw.load_state_tensors({**state, "rounding": torch.tensor(3)})

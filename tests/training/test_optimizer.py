"""AdamW against torch's in fp64, stochastic rounding, exact resume, learning rates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from libreflux.errors import RunError
from libreflux.files import atomic_save_safetensors
from libreflux.recipe import OptimizerSpec
from libreflux.training import optimizer as module
from libreflux.training.gradient import clip_grad_norm, flat_gradient, row_norms
from libreflux.training.optimizer import (
    AdamWBF16,
    AdamWFP32,
    Schedule,
    lr_at,
    make_optimizer,
    parameter_dtype,
)
from libreflux.training.optimizer8 import AdamW8bit
from libreflux.training.rounding import rounding_noise, stochastic_round_

Kind = Literal["adamw", "adamw_bf16"]
COPIES = 4096  # equal numbers with independent rounding: their mean is the expectation over seeds


def gradients(steps: int, width: int, seed: int = 0) -> Tensor:
    """[steps, width]: a drift of either sign with noise, and scales from 0.01 to 100."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(-1, 1, width)
    return (drift + 0.5 * torch.randn(steps, width, generator=generator)) * torch.logspace(-2, 2, width)


def reference(
    start: Tensor, grads: Tensor, learning_rate: float, weight_decay: float
) -> tuple[Tensor, dict[str, Tensor]]:
    parameter = nn.Parameter(start.double())
    adamw = torch.optim.AdamW([parameter], lr=learning_rate, weight_decay=weight_decay)
    for grad in grads:
        parameter.grad = grad.double()
        adamw.step()
    return parameter.detach(), adamw.state[parameter]


def bf16_copies(start: Tensor, grads: Tensor, learning_rate: float, weight_decay: float) -> AdamWBF16:
    parameter = nn.Parameter(start.to(torch.bfloat16).repeat(COPIES, 1))
    adamw = AdamWBF16([("w", parameter)], 3, weight_decay=weight_decay)
    for grad in grads:
        adamw.step(learning_rate, grad.repeat(COPIES))
    return adamw


def weights(adamw: AdamWBF16 | AdamWFP32) -> Tensor:
    return adamw.buckets[0].rows[0][1].detach()


def test_fp32_is_torchs_adamw() -> None:
    start, grads = torch.linspace(-2, 2, 12), gradients(60, 12)
    parameter = nn.Parameter(start.clone())
    adamw = AdamWFP32([("w", parameter)], weight_decay=0.1)
    for grad in grads:
        adamw.step(1e-2, grad)
    expected, state = reference(start, grads, 1e-2, weight_decay=0.1)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-5)
    moments = adamw.state_dict_tensors()
    torch.testing.assert_close(moments["w.exp_avg_sq"].double(), state["exp_avg_sq"], rtol=1e-5, atol=0)


def test_bf16_follows_torchs_fp64_adamw_in_expectation() -> None:
    """Mean over 4096 copies: within 1 % of the way travelled, and moments within 1 % of their size."""
    start, grads = torch.linspace(-2, 2, 12), gradients(60, 12)
    adamw = bf16_copies(start, grads, 1e-2, weight_decay=0.1)
    start = start.to(torch.bfloat16)
    expected, state = reference(start, grads, 1e-2, weight_decay=0.1)
    drift = (weights(adamw).double().mean(0) - expected).abs()
    assert (drift < 0.01 * 60 * 1e-2 * 1.0).all(), drift
    moments = adamw.state_dict_tensors()
    for name in ("exp_avg", "exp_avg_sq"):
        scale = state["exp_avg_sq"].sqrt() if name == "exp_avg" else state["exp_avg_sq"]
        assert ((moments[f"w.{name}"].double().mean(0) - state[name]).abs() < 0.01 * scale).all()


def original_momentum(m: float, grad: float) -> float:
    """The recipe's first optimizer meant m <- 0.9 m + 0.1 g; its add took the factor for the wrong summand."""
    return grad + (1 - 0.9) * (0.9 * m)


def test_momentum_is_a_running_mean() -> None:
    """One gradient, then none: m falls as beta1^t, and the weight goes on moving by it."""
    grads = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    adamw = bf16_copies(torch.zeros(1), grads, 1e-3, weight_decay=0.0)
    m = adamw.state_dict_tensors()["w.exp_avg"].double().mean()
    assert m == pytest.approx(0.1 * 0.9**3, rel=2e-3)
    expected, _ = reference(torch.zeros(1), grads, 1e-3, weight_decay=0.0)
    assert weights(adamw).double().mean() == pytest.approx(float(expected), rel=5e-3)
    lost = 0.0
    for grad in grads[:, 0].tolist():
        lost = original_momentum(lost, grad)
    assert lost < 0.02 * float(m)  # after three steps nothing is left


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("start", [1.0, -1.0])
def test_updates_below_the_last_place_accumulate_without_bias(sign: int, start: float) -> None:
    """100 steps of 1e-4 at 1.0, whose bf16 neighbours are 4e-3 and 8e-3 away: to nearest, nothing would move."""
    adamw = bf16_copies(torch.tensor([start]), torch.full((100, 1), float(sign)), 1e-4, weight_decay=0.0)
    moved = float(weights(adamw).double().mean()) - start
    assert moved == pytest.approx(-sign * 1e-2, rel=0.05)  # standard error <= 1.4 %


def test_weight_decay_below_the_last_place_acts() -> None:
    adamw = bf16_copies(torch.tensor([1.0, -2.0]), torch.zeros(100, 2), 1e-3, weight_decay=0.1)
    expected = torch.tensor([1.0, -2.0]).double() * (1 - 1e-4) ** 100
    torch.testing.assert_close(weights(adamw).double().mean(0), expected, rtol=1e-3, atol=0)


def original_second_moment_(v: Tensor, grad: Tensor) -> None:
    """The recipe's first optimizer: in bf16, rounded to nearest, where 0.999 v is v again."""
    v.mul_(0.999).addcmul_(grad.bfloat16(), grad.bfloat16(), value=0.001)


def test_second_moment_falls_after_a_tenfold_gradient_drop() -> None:
    grads = torch.ones(1200, 1)
    grads[200:] = 0.1
    parameter = nn.Parameter(torch.zeros(256, dtype=torch.bfloat16))
    adamw = AdamWBF16([("w", parameter)], 0, weight_decay=0.0)
    for grad in grads:
        adamw.step(1e-4, grad.repeat(256))
    _, state = reference(torch.zeros(1), grads, 1e-4, weight_decay=0.0)
    v = adamw.state_dict_tensors()["w.exp_avg_sq"].double().mean()
    assert v == pytest.approx(float(state["exp_avg_sq"]), rel=0.03)
    stuck = torch.zeros(1, dtype=torch.bfloat16)
    for grad in grads:
        original_second_moment_(stuck, grad)
    assert stuck.item() > 1.5 * float(v)  # it stays where it was


@given(
    st.floats(min_value=-(2.0**100), max_value=2.0**100, allow_nan=False, width=32).filter(
        lambda x: x == 0 or abs(x) > 1e-30
    )
)
def test_stochastic_rounding_is_exactly_unbiased(value: float) -> None:
    """Over all 65536 noise values the mean is the number itself, and only its two neighbours occur."""
    noise = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    target = torch.empty(1 << 16, dtype=torch.bfloat16)
    stochastic_round_(target, torch.full((1 << 16,), value), noise)
    assert target.double().mean().item() == pytest.approx(value, rel=1e-12)
    assert target.unique().numel() <= 2
    assert (target.double() - value).abs().max() <= abs(value) / 128


def test_infinity_stays_infinity() -> None:
    target = torch.empty(2, dtype=torch.bfloat16)
    stochastic_round_(target, torch.tensor([math.inf, -math.inf]), torch.tensor([32767, -32768], dtype=torch.int16))
    assert target.tolist() == [math.inf, -math.inf]


def test_rounding_noise_is_uniform_and_keyed() -> None:
    device = torch.device("cpu")
    noise = rounding_noise(200_000, 3, 0, 1, "a", device)
    counts = torch.bincount((noise.long() + (1 << 15)).flatten() >> 8, minlength=256).double()
    expected = noise.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 256 + 6 * math.sqrt(2 * 256)
    assert abs(torch.corrcoef(noise.double())[0, 1]) < 5 / math.sqrt(200_000)
    assert noise.equal(rounding_noise(200_000, 3, 0, 1, "a", device))
    for other in ((1, 1, "a"), (0, 2, "a"), (0, 1, "b")):
        assert not noise.equal(rounding_noise(200_000, 3, *other, device))


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16"])
def test_resume_is_bit_exact(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET", 100)  # several buckets
    spec = OptimizerSpec(kind=kind)

    def rows() -> list[tuple[str, nn.Parameter]]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (3, 5), "b": (40,), "c": (16, 16), "d": (1,)}
        return [
            (name, nn.Parameter(torch.randn(shape, generator=generator).to(parameter_dtype(spec))))
            for name, shape in shapes.items()
        ]

    grads = gradients(12, sum(parameter.numel() for _, parameter in rows()))
    through = rows()
    whole = make_optimizer(spec, through, seed=7)
    assert not isinstance(whole, AdamW8bit)
    assert len(whole.buckets) > 1
    for grad in grads:
        whole.step(1e-2, grad)

    first = rows()
    before = make_optimizer(spec, first, seed=7)
    for grad in grads[:5]:
        before.step(1e-2, grad)
    atomic_save_safetensors(before.state_dict_tensors(), tmp_path / "optimizer.safetensors")

    second = [(name, nn.Parameter(parameter.detach().clone())) for name, parameter in first]
    after = make_optimizer(spec, second, seed=7)
    after.load_state_tensors(load_file(tmp_path / "optimizer.safetensors"))
    for grad in grads[5:]:
        after.step(1e-2, grad)
    for (name, one), (_, other) in zip(through, second, strict=True):
        assert one.equal(other), name
    for key, tensor in whole.state_dict_tensors().items():
        assert tensor.equal(after.state_dict_tensors()[key]), key


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16"])
def test_buckets_change_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bucketed arithmetic and its plain twin, one parameter at a time, agree to rounding of fp32."""
    spec, results = OptimizerSpec(kind=kind), []
    for size in (1, 1 << 22):
        monkeypatch.setattr(module, "BUCKET", size)
        named = [(f"p{i}", nn.Parameter(torch.full((8,), 0.1 * i).to(parameter_dtype(spec)))) for i in range(4)]
        adamw = make_optimizer(spec, named, seed=1)
        for grad in gradients(6, 32):
            adamw.step(1e-2, grad)
        results.append(torch.cat([parameter.detach() for _, parameter in named]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_seed_decides_the_rounding() -> None:
    results = []
    for seed in (0, 0, 1):
        parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        AdamWBF16([("w", parameter)], seed).step(1e-3, torch.ones(64))
        results.append(parameter.detach())
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


def test_own_gradients_and_flat_gradient_agree() -> None:
    results = []
    for own in (True, False):
        named = [("a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.ones(2, 2)))]
        named[0][1].grad, named[1][1].grad = torch.arange(3.0), torch.ones(2, 2)
        adamw = AdamWFP32(named)
        adamw.step(1e-2, None if own else flat_gradient(parameter for _, parameter in named))
        results.append(torch.cat([parameter.detach().flatten() for _, parameter in named]))
        adamw.zero_grad()
        assert all(parameter.grad is None for _, parameter in named)
    assert results[0].equal(results[1])
    assert not results[0].eq(1).all()


def test_clip_grad_norm() -> None:
    gradient = torch.tensor([3.0, 0.0, -4.0])
    assert clip_grad_norm(gradient, 10.0) == pytest.approx(5.0)
    assert gradient.tolist() == [3.0, 0.0, -4.0]
    assert clip_grad_norm(gradient, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.0, -0.8]))
    assert clip_grad_norm(gradient, None) == pytest.approx(1.0)
    assert math.isnan(clip_grad_norm(torch.tensor([1.0, math.nan]), 1.0))
    assert clip_grad_norm(torch.tensor([1.0, -math.inf]), 1.0) == math.inf


def test_norms_by_rows_are_those_of_fp64() -> None:
    for count in (1, 4095, 4096, 3 * 4096 + 5):
        gradient = torch.randn(count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-6, 6, count)
        wanted = float(gradient.double().norm())
        assert float(row_norms(gradient).norm()) == pytest.approx(wanted, rel=1e-5)
    assert not row_norms(torch.tensor([1.0, float("nan")])).isfinite().all()


def test_learning_rates() -> None:
    def rates(schedule: Schedule) -> list[float]:
        return [lr_at(s, learning_rate=2.0, steps=10, warmup=4, schedule=schedule) for s in range(10)]

    for schedule in get_args(Schedule):
        assert rates(schedule)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates("constant")[5:] == [2.0] * 5
    assert rates("linear")[5:] == pytest.approx([2 * (6 - i) / 6 for i in range(1, 6)])
    assert rates("cosine")[7] == pytest.approx(1.0)  # half way
    assert all(rate > 0 for rate in rates("cosine"))
    assert lr_at(10, learning_rate=2.0, steps=10, schedule="cosine") == pytest.approx(0.0)


def test_refusals() -> None:
    fp32, bf16 = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(RunError, match="bfloat16"):
        make_optimizer(OptimizerSpec(kind="adamw_bf16"), [("a", fp32)], 0)
    with pytest.raises(RunError, match="float32"):
        make_optimizer(OptimizerSpec(kind="adamw"), [("a", bf16)], 0)
    with pytest.raises(RunError):
        make_optimizer(OptimizerSpec(kind="adamw"), [], 0)
    with pytest.raises(ValueError, match="names"):
        AdamWFP32([("a", fp32), ("a", nn.Parameter(torch.ones(2)))])
    adamw = AdamWFP32([("a", fp32)])
    with pytest.raises(ValueError, match="gradient"):
        adamw.step(1e-3, torch.ones(3))
    state = adamw.state_dict_tensors()
    with pytest.raises(RunError, match=r"b\.exp_avg"):
        adamw.load_state_tensors({**state, "b.exp_avg": torch.zeros(2)})
    with pytest.raises(RunError, match=r"a\.exp_avg_sq"):
        adamw.load_state_tensors({**state, "a.exp_avg_sq": torch.zeros(2, dtype=torch.bfloat16)})
    with pytest.raises(RunError, match="step"):
        adamw.load_state_tensors({key: tensor for key, tensor in state.items() if key != "step"})

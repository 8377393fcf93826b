"""The adversary: its losses by hand, its gradients beside those of a plain computation, and that both sides learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from libreflux.adapter.adapter import Adapter
from libreflux.flow.path import interpolate
from libreflux.flow.schedule import ladder
from libreflux.model import numerics
from libreflux.model.compiling import CompiledBlocks
from libreflux.model.features import image_features
from libreflux.model.latents import pack
from libreflux.model.offload import BlockOffload
from libreflux.model.text import TextConditioning
from libreflux.recipe import AdversarialSpec
from libreflux.training import adversary as adversary_module
from libreflux.training import adversary_heads as heads
from libreflux.training.adversary import Adversary, chosen_blocks, draw_rungs, lower_rungs, renoise_sigmas
from libreflux.training.objective import NoisedBatch
from model.bases import adapted, based


def test_hinge_losses_by_hand() -> None:
    verdicts = torch.tensor([[0.5, 2.0, -1.0], [-3.0, 0.0, 1.0]])
    assert heads.real_hinge(verdicts).tolist() == pytest.approx([(0.5 + 0 + 2) / 3, (4 + 1 + 0) / 3])
    assert heads.drawn_hinge(verdicts).tolist() == pytest.approx([(1.5 + 3 + 0) / 3, (0 + 1 + 2) / 3])
    assert heads.adversarial_loss(verdicts).tolist() == pytest.approx([-0.5, 2 / 3])


def test_the_penalty_by_hand_and_its_own_gradient() -> None:
    features = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert heads.feature_penalty(features @ weights, features).tolist() == pytest.approx([14.0, 14.0])
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = heads.feature_penalty(factor * features.square().sum(2) / 2, features)
    lengths = features.detach().square().sum(2).mean(1)
    torch.testing.assert_close(penalty.detach(), 0.49 * lengths)
    [by_factor] = torch.autograd.grad(penalty.sum(), factor)
    torch.testing.assert_close(by_factor, 2 * 0.7 * lengths.sum())


def test_levels_follow_their_law_and_the_early_ladder_is_its_lower_half() -> None:
    levels = torch.cat([renoise_sigmas(AdversarialSpec(noise_mean=0.5, noise_std=2.0), 500, 3, n) for n in range(20)])
    logits = torch.logit(levels.double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logits.std()) == pytest.approx(2.0, abs=0.02)
    for shift in (1.0, 3.0):
        rungs = ladder(4, shift)[:-1]
        assert lower_rungs(rungs, 4, shift).tolist() == rungs[[2, 2, 3, 3]].tolist()
    assert lower_rungs(torch.tensor([1.0]), 1).tolist() == [1.0]
    assert chosen_blocks(AdversarialSpec(), 57) == (5, 17, 28, 39, 51)
    assert chosen_blocks(AdversarialSpec(), 3) == (0, 1, 2)
    assert chosen_blocks(AdversarialSpec(blocks=(4, 1)), 3) == (4, 1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rungs_are_drawn_by_their_weights(shift: float) -> None:
    """Of every step's slots half begin at pure noise, where the recipe says nothing else."""
    rungs = ladder(4, shift)[:-1]

    def shares(spec: AdversarialSpec, count: int, step: int) -> list[float]:
        drawn = draw_rungs(spec, 4, count, 3, step, shift=shift)
        assert drawn.dtype == torch.float32
        return [float((drawn == rung).sum()) / count for rung in rungs]

    assert shares(AdversarialSpec(), 12, 5) == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])
    assert shares(AdversarialSpec(rungs=(1, 2, 3, 4)), 10, 5) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert shares(AdversarialSpec(warmup=6), 12, 5) == pytest.approx([0, 0, 2 / 3, 1 / 3])
    assert shares(AdversarialSpec(warmup=5), 12, 5) == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])
    draws = [draw_rungs(AdversarialSpec(), 4, 6, seed, step) for seed, step in ((3, 0), (3, 1), (4, 0), (3, 0))]
    assert torch.equal(draws[0], draws[3])
    assert not any(torch.equal(draws[0], other) for other in draws[1:3])
    assert draw_rungs(AdversarialSpec(), 1, 3, 3, 0).tolist() == [1.0] * 3


# ---- one pass -----------------------------------------------------------------------------------------------------


def pictures() -> tuple[NoisedBatch, NoisedBatch]:
    draw = torch.Generator().manual_seed(3)
    latents, noise, other = torch.randn(3, 2, 16, 4, 6, generator=draw)
    tokens = [torch.randn(length, 24, generator=draw) for length in (3, 5)]
    text = TextConditioning(tokens, torch.randn(2, 16, generator=draw))
    return (
        NoisedBatch(latents, noise, torch.tensor([1.0, 0.5]), text),
        NoisedBatch(latents, other, torch.tensor([0.8, 0.3]), text),
    )


WEIGHTS = torch.tensor([0.3, 0.7])


def made(base: str, **spec: Any) -> tuple[Any, Any, Adapter, Adversary]:
    """A copy of the base, the base with an adapter on it, and heads that have an opinion."""
    alone = based(base)
    transformer = copy.deepcopy(alone)
    adapter = adapted(transformer)
    adversary = Adversary(AdversarialSpec(width=8, **spec), transformer, 0, "cpu")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adversary.parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return alone, transformer, adapter, adversary


def learned(transformer: Any, adapter: Adapter, adversary: Adversary) -> tuple[Any, list[Tensor], Tensor]:
    adversary.forget()
    for parameter in adapter.parameters():
        parameter.grad = None
    found = adversary.learn(transformer, adapter, *pictures(), WEIGHTS)
    gradients = [one.grad.clone() for one in adapter.parameters() if one.grad is not None]
    return found, gradients, adversary.gradient.clone()


def plainly(alone: Any, transformer: Any, adapter: Adapter, adversary: Adversary) -> tuple[list[Tensor], list[Tensor]]:
    """The same two gradients, written out: a copy of the base as the teacher, each loss with its own graph."""
    batch, again = pictures()
    spec, blocks = adversary.spec, adversary.blocks
    told = heads.condition(again.sigma, again.text.pooled)

    def verdicts(x: Tensor, *, cut: bool) -> tuple[list[Tensor], list[Tensor]]:
        with image_features(alone, blocks) as found:
            again.velocity(alone, x, again.sigma)
        seen = [heads.standardised(found[block]) for block in blocks]
        seen = [one.detach().requires_grad_() for one in seen] if cut else seen
        return [adversary.heads.heads[str(n)](one, 2, told) for n, one in zip(blocks, seen, strict=True)], seen

    v = batch.velocity(transformer, batch.x_sigma, batch.sigma)
    x0 = batch.x_sigma - batch.sigma[:, None, None] * v
    x = interpolate(x0, pack(again.noise), again.sigma)
    fooled, _ = verdicts(x, cut=False)
    flow = (v - pack(batch.noise - batch.latents)).square().mean(dim=(1, 2))
    student = sum(-one.mean(1) for one in fooled) / len(blocks) + spec.reconstruction * flow
    by_student = torch.autograd.grad(student @ WEIGHTS, list(adapter.parameters()))
    on_real, real = verdicts(again.x_sigma, cut=True)
    on_drawn, _ = verdicts(x, cut=True)
    loss = torch.zeros(2)
    for one, other, features in zip(on_real, on_drawn, real, strict=True):
        [slope] = torch.autograd.grad(one.sum(), features, create_graph=True)
        hinges = (1 - one).clamp(min=0).mean(1) + (1 + other).clamp(min=0).mean(1)
        loss = loss + (hinges + spec.penalty * slope.square().sum(2).mean(1)) / len(blocks)
    return list(by_student), list(torch.autograd.grad(loss @ WEIGHTS, adversary.parameters))


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
def test_both_gradients_are_those_of_two_separate_networks(base: str) -> None:
    alone, transformer, adapter, adversary = made(base, penalty=0.3, reconstruction=0.2)
    student, of_heads = plainly(alone, transformer, adapter, adversary)
    _, gradients, gradient = learned(transformer, adapter, adversary)
    rtol, atol = 1e-5, 1e-7
    torch.testing.assert_close(gradients, student, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient, torch.cat([one.reshape(-1) for one in of_heads]), rtol=1e-4, atol=1e-6)
    numerics.enable_checkpointing(transformer)
    _, checked, again = learned(transformer, adapter, adversary)
    assert all(map(torch.equal, checked, gradients))
    assert torch.equal(again, gradient)
    BlockOffload(transformer, 3, "cpu")
    _, waited, again = learned(transformer, adapter, adversary)
    torch.testing.assert_close(waited, gradients, rtol=1e-5, atol=1e-7)  # weights at other addresses
    assert all(parameter.grad is None for parameter in adversary.parameters)


def test_the_penalty_goes_by_the_features_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves the heads, not the student, and nothing of the teacher is differentiated for it."""
    _, transformer, adapter, adversary = made("int8", penalty=0.0)
    _, student, without = learned(transformer, adapter, adversary)
    seen: list[Tensor] = []
    own = heads.feature_penalty

    graphs: list[bool] = []

    def watched(verdicts: Tensor, features: Tensor, **how: bool) -> Tensor:
        seen.append(features)
        penalty = own(verdicts, features, **how)
        graphs.append(penalty.requires_grad)
        return penalty

    monkeypatch.setattr(adversary_module, "feature_penalty", watched)
    told, _, again = learned(transformer, adapter, adversary)
    assert torch.equal(again, without)
    assert graphs == [False] * 3  # without weight it is told, and has no graph of second order
    assert bool((told.told["penalty"] > 0).all())
    del seen[:]
    adversary.spec = AdversarialSpec(width=8, penalty=10.0)
    found, same, with_it = learned(transformer, adapter, adversary)
    assert all(map(torch.equal, same, student))
    assert not torch.allclose(with_it, without, atol=1e-3)
    assert len(seen) == 3
    assert all(one.is_leaf and one.requires_grad for one in seen)
    hinge = found.told["discriminator_loss"] - 10 * found.told["penalty"]
    assert bool((hinge > 0).all() & (found.told["penalty"] > 0).all())


def test_compiled_blocks_compute_real_and_drawn_pictures_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks before the first adapted one too, which have no gradient of their own to record."""
    transformer = based("fp32")
    transformer.transformer_blocks = torch.nn.ModuleList()  # half the time to compile
    adapter = adapted(transformer, "single_transformer_blocks.1.attn.to_q")
    adversary = Adversary(AdversarialSpec(width=8, blocks=(0, 1)), transformer, 0, "cpu")
    compiled, found = CompiledBlocks(transformer, backend="aot_eager"), list[tuple[dict[int, Tensor], int]]()
    own = adversary._features

    def watched(*given: Any) -> dict[int, Tensor]:
        found.append((own(*given), compiled.graphs))
        return found[-1][0]

    monkeypatch.setattr(adversary, "_features", watched)
    adversary.learn(transformer, adapter, *pictures(), WEIGHTS, compiled=True)
    (real, before), (_, after) = found
    assert before == after == compiled.graphs, compiled.graphs_by_kind
    _, again = pictures()
    with adapter.disabled():
        drawn = own(transformer, again, again.x_sigma.requires_grad_() * 1)  # as through a student
    assert compiled.graphs == after
    assert all(torch.equal(real[block], drawn[block]) for block in (0, 1))


def test_passes_of_a_step_add_up() -> None:
    _, transformer, adapter, adversary = made("fp32")
    _, once, heads_once = learned(transformer, adapter, adversary)
    adversary.learn(transformer, adapter, *pictures(), WEIGHTS)
    twice = [parameter.grad for parameter in adapter.parameters()]
    torch.testing.assert_close(adversary.gradient, 2 * heads_once)
    torch.testing.assert_close(twice, [2 * one for one in once])


def test_heads_begin_without_an_opinion_and_learn_to_tell_and_a_student_to_fool_them() -> None:
    alone = based("fp32")
    adapter = adapted(alone)
    adversary = Adversary(AdversarialSpec(width=16, learning_rate=5e-3), alone, 0, "cpu")
    first, gradients, _ = learned(alone, adapter, adversary)
    assert first.losses.tolist() == [0.0, 0.0]
    assert not any(bool(one.any()) for one in gradients)
    for step in range(40):
        found, gradients, _ = learned(alone, adapter, adversary)
        adversary.move(step, None)  # type: ignore[arg-type]
    told = found.told["discriminator_loss"] - adversary.spec.penalty * found.told["penalty"]
    assert float(told.mean()) < 0.5  # 2 at the beginning
    fooling = float(found.losses @ WEIGHTS)
    assert fooling > 0.5
    length = torch.cat([one.reshape(-1) for one in gradients]).norm()
    with torch.no_grad():
        for parameter, one in zip(adapter.parameters(), gradients, strict=True):
            parameter.sub_(one, alpha=float(0.02 / length))
    moved, _, _ = learned(alone, adapter, adversary)
    fallen = fooling - float(moved.losses @ WEIGHTS)
    assert 0.3 * 0.02 * float(length) < fallen < 3 * 0.02 * float(length)  # as its gradient says

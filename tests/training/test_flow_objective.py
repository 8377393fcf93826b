"""`guided_target` and `hold_base`: the formula by separate copies of the model, what passes they cost, what is told."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from least import LEAST
from libreflux.adapter.adapter import Adapter
from libreflux.data.batches import Batch
from libreflux.flow.guidance import cfg, decayed_scale, guided_target
from libreflux.model.compiling import CompiledBlocks
from libreflux.model.text import TextConditioning
from libreflux.recipe import GuidedTargetSpec, HoldBaseSpec, load_recipe
from libreflux.training.flow_objective import (
    FlowKeys,
    Roles,
    extra_passes,
    flow_keys,
    learn,
    second_passes,
    told_parts,
)
from libreflux.training.objective import Learned, NoisedBatch, flow_matching_loss, regularised_target
from libreflux.workflows.dry_run import passes_lines
from model.bases import adapted, based

CAPTIONS, REGULARISED = ("a fox", "a frog", "", "an apple"), (False, True, False, False)
BOTH = FlowKeys(GuidedTargetSpec(scale=3, decay=0.5), HoldBaseSpec(weight=0.4, sigmas=(0.3, 1)))
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0])


def drawn(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def empty_prompt() -> TextConditioning:
    return TextConditioning([torch.randn(2, 24, generator=drawn(9))], torch.randn(1, 16, generator=drawn(8)))


def noised() -> NoisedBatch:
    """Four pictures at sigma 0.1 to 0.9; the third has the empty prompt."""
    random, empty = drawn(), empty_prompt()
    latents, noise = torch.randn(2, 4, 16, 4, 6, generator=random)
    tokens = [torch.randn(length, 24, generator=random) for length in (3, 7, 7, 1)]
    pooled = torch.randn(4, 16, generator=random)
    tokens[2], pooled[2] = empty.tokens[0], empty.pooled[0]
    return NoisedBatch(latents, noise, torch.linspace(0.1, 0.9, 4), TextConditioning(tokens, pooled))


def roles(keys: FlowKeys) -> Roles:
    given: Any = Batch(torch.zeros(4), noised().text, CAPTIONS, CAPTIONS, (0, 1, 2, 3), WEIGHTS, REGULARISED)
    return Roles.of(keys, given, noised().sigma.tolist())


def learnt(transformer: FluxTransformer2DModel, adapter: Adapter, keys: FlowKeys) -> tuple[Learned, list[Tensor]]:
    """What a pass tells, and the gradients that it leaves."""
    for parameter in adapter.parameters():
        parameter.grad = None
    found = learn(transformer, adapter, noised(), WEIGHTS, keys=keys, roles=roles(keys), empty=empty_prompt())
    return found, [torch.zeros(0) if one.grad is None else one.grad.clone() for one in adapter.parameters()]


def naive(live: FluxTransformer2DModel, own: FluxTransformer2DModel, base: FluxTransformer2DModel) -> Tensor:
    """The losses under `BOTH`, picture by picture, by three networks: the trained one, its copy, and the base."""
    losses = []
    for i in range(4):
        one = noised().index([i])
        x, sigma = one.x_sigma, one.sigma
        with torch.no_grad():
            of_base = one.velocity(base, x, sigma)
            u = one.velocity(own, x, sigma, empty_prompt())
        scale = 1 + 2 * float(sigma) ** 0.5 if CAPTIONS[i] else 1.0
        wanted = of_base if REGULARISED[i] else u + scale * (one.target - u)
        v = one.velocity(live, x, sigma)
        held = 0.4 * (v - of_base).square().mean() if i in (2, 3) else 0.0
        losses.append((v - wanted).square().mean() + held)
    return torch.stack(losses)


@pytest.mark.parametrize(("base", "checkpointing"), [("fp32", False), ("fp32", True), ("int8", True), ("w8a8", False)])
def test_losses_and_gradients_are_those_of_separate_models(base: str, checkpointing: bool) -> None:
    transformer = based(base)
    frozen = copy.deepcopy(transformer)
    adapter = adapted(transformer)
    own = copy.deepcopy(transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    found, gradients = learnt(transformer, adapter, BOTH)
    wanted = naive(transformer, own, frozen)
    by_hand = torch.autograd.grad(wanted @ WEIGHTS, list(adapter.parameters()))
    exact = base == "fp32"
    torch.testing.assert_close(found.losses, wanted.detach(), rtol=1e-5 if exact else 0.02, atol=1e-5)
    apart = sum(float((a - b).norm()) for a, b in zip(gradients, by_hand, strict=True))
    assert apart < (1e-4 if exact else 0.08) * sum(float(one.norm()) for one in by_hand)


def test_the_guided_target_is_guidance_of_the_target_and_its_scale_falls_towards_the_picture() -> None:
    target, u = torch.randn(2, 3, 5, 4, generator=drawn())
    torch.testing.assert_close(guided_target(target, u, torch.tensor([3.0, 3, 3])), cfg(target, u, 3.0))
    mixed = guided_target(target, u, torch.tensor([1.0, 2, 4]))
    assert torch.equal(mixed[0], target[0])
    torch.testing.assert_close(mixed[2], cfg(target[2], u[2], 4.0))
    sigma = torch.tensor([0.0, 0.25, 1.0])
    assert decayed_scale(3.0, sigma, 0.0).tolist() == [3, 3, 3]
    assert decayed_scale(3.0, sigma, 0.5).tolist() == [1, 2, 3]
    assert decayed_scale(1.0, sigma, 2.0).tolist() == [1, 1, 1]


@pytest.fixture
def model() -> tuple[FluxTransformer2DModel, Adapter]:
    transformer = based("fp32")
    return transformer, adapted(transformer)


def test_a_picture_with_the_empty_prompt_has_the_plain_target(model: tuple[FluxTransformer2DModel, Adapter]) -> None:
    keys = FlowKeys(GuidedTargetSpec(scale=4))
    found, _ = learnt(*model, keys)
    with torch.no_grad():
        plain = flow_matching_loss(model[0], noised())
    assert roles(keys).guided == [True, False, False, True]
    torch.testing.assert_close(found.losses[2], plain[2])
    torch.testing.assert_close(found.told["plain_loss"], plain)
    assert not torch.isclose(found.losses[[0, 3]], plain[[0, 3]], rtol=0.01).any()


def test_a_guided_target_has_no_gradient_of_its_own(model: tuple[FluxTransformer2DModel, Adapter]) -> None:
    """u is the live model's: were its gradient kept, the pull would be another."""
    own = copy.deepcopy(model[0])
    _, gradients = learnt(*model, FlowKeys(GuidedTargetSpec(scale=3)))
    batch = noised()
    target = regularised_target(*model, batch, REGULARISED)
    with torch.no_grad():
        u = batch.velocity(own, batch.x_sigma, batch.sigma, empty_prompt().index([0] * 4))
    target[[0, 3]] = (u + 3 * (batch.target - u))[[0, 3]]
    loss = flow_matching_loss(model[0], batch, target=target) @ WEIGHTS
    torch.testing.assert_close(gradients, list(torch.autograd.grad(loss, list(model[1].parameters()))))


def passes(transformer: FluxTransformer2DModel) -> list[tuple[int, bool]]:
    """Pictures and whether a gradient is kept, of each pass from now on."""
    found: list[tuple[int, bool]] = []
    transformer.register_forward_hook(
        lambda module, args, kwargs, out: found.append((len(out[0]), out[0].requires_grad)), with_kwargs=True
    )
    return found


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (BOTH, [(3, False), (2, False), (4, True)]),  # the base for the regularised and two held ones together
        (FlowKeys(BOTH.guided), [(1, False), (2, False), (4, True)]),
        (FlowKeys(None, HoldBaseSpec(weight=1)), [(4, False), (4, True)]),
        (FlowKeys(None, HoldBaseSpec(weight=1, sigmas=(0.95, 1))), [(1, False), (4, True)]),
    ],
)
def test_pictures_pay_for_the_passes_that_they_need(
    model: tuple[FluxTransformer2DModel, Adapter], keys: FlowKeys, wanted: list[tuple[int, bool]]
) -> None:
    found = passes(model[0])
    learnt(*model, keys)
    assert found == wanted


def test_the_penalty_is_nothing_while_the_adapter_does_nothing() -> None:
    transformer = based("fp32")
    adapter = adapted(transformer)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    found, _ = learnt(transformer, adapter, FlowKeys(None, HoldBaseSpec(weight=7)))
    assert found.told["hold_base_loss"].tolist() == [0.0] * 4
    assert found.told["held"].tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(found.losses[[0, 2, 3]], found.told["plain_loss"][[0, 2, 3]])


def test_an_adapter_beside_is_off_where_the_base_is_compared_with() -> None:
    """One that is left out of the result, as a training adapter is: the penalty sees the result's own velocity."""
    transformer = based("fp32")
    frozen = copy.deepcopy(transformer)
    adapter = adapted(transformer)
    result = copy.deepcopy(transformer)
    beside = adapted(transformer, "**.attn.**")
    own = copy.deepcopy(transformer)
    both = Adapter(transformer, {**adapter.layers, **{f"{name}, over": one for name, one in beside.layers.items()}})
    given: dict[str, Any] = {"keys": BOTH, "roles": roles(BOTH), "empty": empty_prompt(), "beside": beside}
    found = learn(transformer, both, noised(), WEIGHTS, **given)
    batch = noised()
    with torch.no_grad():
        x, sigma = batch.x_sigma, batch.sigma
        b, v = batch.velocity(frozen, x, sigma), batch.velocity(own, x, sigma)
        apart = (batch.velocity(result, x, sigma) - b).square().mean(dim=(1, 2))
        u = batch.velocity(own, x, sigma, empty_prompt().index([0] * 4))
        scale = 1 + 2 * sigma**0.5 * torch.tensor([1.0, 1, 0, 1])
        guided = (v - u - scale.view(4, 1, 1) * (batch.target - u)).square().mean(dim=(1, 2))
    wanted = torch.stack([guided[0], apart[1], guided[2] + 0.4 * apart[2], guided[3] + 0.4 * apart[3]])
    torch.testing.assert_close(found.losses, wanted, rtol=1e-4, atol=1e-6)


def test_the_parts_are_means_over_the_pictures_that_they_are_of() -> None:
    rows = [(1.0, 4.0, 0.5, 1.0), (3.0, 2.0, 0.0, 0.0)]
    assert told_parts(rows, BOTH) == {"plain_loss": 2, "guided_loss": 3, "hold_base_loss": 0.5}
    assert told_parts([rows[1]], BOTH) == {"plain_loss": 3, "guided_loss": 2}
    assert told_parts([(1.0, 0.5, 1.0)], FlowKeys(None, BOTH.hold)) == {"plain_loss": 1, "hold_base_loss": 0.5}
    assert told_parts([(1.0, 4.0)], FlowKeys(BOTH.guided)) == {"plain_loss": 1, "guided_loss": 4}


def test_compiled_blocks_give_the_same_losses_and_a_graph_for_each_way() -> None:
    """With gradient, without it, and without the adapter; of one kind of block, since each takes seconds."""
    transformer = based("fp32")
    transformer.transformer_blocks = nn.ModuleList()
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:1]
    adapter = adapted(transformer, "**.attn.to_q")
    batch = replace(noised(), text=noised().text.index([1, 2, 1, 2]))  # of one length: masks have graphs of their own
    keys, marks = FlowKeys(BOTH.guided, HoldBaseSpec(weight=1)), Roles([False] * 4, [True] * 4, [True] * 4)

    def losses() -> list[float]:
        empty = noised().text.index([1])
        found = learn(transformer, adapter, batch, WEIGHTS, keys=keys, roles=marks, empty=empty)
        return [float(loss) for loss in found.losses]

    wanted = losses()
    compiled = CompiledBlocks(transformer, backend="eager")
    assert losses() == pytest.approx(wanted, rel=1e-5)
    assert (compiled.kinds, compiled.graphs) == (1, 3)


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], {}),
        (["guided_target.scale=1", "hold_base.weight=0"], {}),
        (["guided_target.scale=2", "data.0.caption_dropout=0.25"], {"guided_target": 0.75}),
        (["hold_base.weight=1"], {"hold_base": 1.0}),
        (["hold_base={weight: 1, sigmas: [0.5, 1]}"], {"hold_base": 0.5}),
        (["hold_base={weight: 1, sigmas: [0, 0.2]}", "sigmas.law=uniform"], {"hold_base": 0.2}),
    ],
)
def test_what_the_keys_add_is_known_beforehand(overrides: list[str], passes: dict[str, float]) -> None:
    recipe = load_recipe(None, [*LEAST, *overrides])
    assert extra_passes(recipe) == pytest.approx(passes)
    assert (flow_keys(recipe) is None) == (passes == {})


def test_a_held_base_beside_a_training_adapter_takes_a_second_pass_with_gradient() -> None:
    given = [*LEAST, "adapter.training_adapter=a.safetensors"]
    held = load_recipe(None, [*given, "hold_base.weight=1"])
    assert second_passes(held) == 1
    assert second_passes(load_recipe(None, [*given, "hold_base={weight: 1, sigmas: [0.5, 1]}"])) == pytest.approx(0.5)
    assert second_passes(load_recipe(None, [*given, "guided_target.scale=2"])) == 0
    assert second_passes(load_recipe(None, [*LEAST, "hold_base.weight=1"])) == 0
    (line,) = passes_lines(held)
    assert ": one with gradient, 1 more with gradient for hold_base without the training adapter, and without" in line
    assert "a step takes about 2.5 times as long" in line

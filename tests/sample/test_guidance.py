"""Guidance: which passes it costs, and that what they are batched as does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from libreflux.flow.guidance import cfg, rescale
from libreflux.sample.draw_settings import guided_steps
from libreflux.sample.guidance import BatchCfg
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import tensor_of

LONG, SHORT = "a small green frog sits under a tall tree, and the sky behind it is orange", "a fox"


def passes(
    pipe: LibreFluxPipeline, prompt: str | list[str], negative: str | list[str], **options: Any
) -> list[tuple[int, bool]]:
    """(batch, masked) of each of the transformer's calls."""
    seen: list[tuple[int, bool]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["hidden_states"].shape[0], kwargs["joint_attention_kwargs"] is not None))

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        pipe(prompt, negative, seeds=0, output_type="latent", **options)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("prompt", "negative", "how", "expected"),
    [
        (SHORT, SHORT, "auto", [(2, False)]),
        (SHORT, LONG, "auto", [(1, False), (1, False)]),
        (SHORT, LONG, True, [(2, True)]),
        (SHORT, SHORT, False, [(1, False), (1, False)]),
        ([SHORT, SHORT], "", "auto", [(2, False), (2, False)]),
        ([SHORT, LONG], [LONG, SHORT], "auto", [(4, True)]),  # each of two passes would be masked too
    ],
)
def test_passes_of_a_guided_step(
    pipe: LibreFluxPipeline,
    prompt: str | list[str],
    negative: str | list[str],
    how: BatchCfg,
    expected: list[tuple[int, bool]],
) -> None:
    assert passes(pipe, prompt, negative, guidance_scale=3.0, num_inference_steps=2, batch_cfg=how) == expected * 2


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("how", [True, False, "auto"])
def test_no_guidance_costs_one_pass(pipe: LibreFluxPipeline, scale: float, how: BatchCfg) -> None:
    options: dict[str, Any] = {
        "guidance_scale": scale,
        "num_inference_steps": 3,
        "batch_cfg": how,
        "guidance_rescale": 0.5,
    }
    assert passes(pipe, SHORT, LONG, **options) == [(1, False)] * 3


def test_a_guidance_below_one_is_a_mean_of_both_velocities(pipe: LibreFluxPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 1, "seeds": 3, "output_type": "latent"}
    assert passes(pipe, SHORT, SHORT, guidance_scale=0.25, num_inference_steps=2) == [(2, False)] * 2
    prompt, other = (tensor_of(pipe(text, guidance_scale=1, **options)) for text in (SHORT, LONG))
    mixed = tensor_of(pipe(SHORT, LONG, guidance_scale=0.25, **options))
    torch.testing.assert_close(mixed, other + 0.25 * (prompt - other), atol=1e-5, rtol=0)
    assert (mixed - prompt).abs().max() > 1e-3


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_batched_or_not_is_one_result(pipe: LibreFluxPipeline, phi: float) -> None:
    common: dict[str, Any] = {"guidance_scale": 4.0, "guidance_rescale": phi, "seeds": 3, "output_type": "latent"}
    one, two, auto = (
        tensor_of(pipe([SHORT, LONG], ["", LONG], batch_cfg=how, **common)) for how in (True, False, "auto")
    )
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    torch.testing.assert_close(auto, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("start", "stop", "guided"),
    [
        (0.0, 1.0, [0, 1, 2, 3]),
        (0.25, 0.75, [1, 2]),
        (0.3, 0.6, [2]),
        (0.5, 1.0, [2, 3]),
        (0.0, 0.01, [0]),
    ],
)
def test_the_interval_of_guidance(pipe: LibreFluxPipeline, start: float, stop: float, guided: list[int]) -> None:
    options: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 4, "batch_cfg": True}
    seen = passes(pipe, SHORT, SHORT, guidance_start=start, guidance_stop=stop, **options)
    assert [batch for batch, _ in seen] == [2 if i in guided else 1 for i in range(4)]


def test_a_start_in_steps_and_one_in_fractions_agree() -> None:
    for steps in range(1, 120):
        for k in range(steps):
            assert guided_steps(steps, start=k / steps) == guided_steps(steps, no_cfg_until=k) == range(k, steps)
            assert guided_steps(steps, stop=(k + 1) / steps) == range(k + 1)


def test_no_cfg_until_is_the_fraction(pipe: LibreFluxPipeline) -> None:
    ways: tuple[dict[str, Any], ...] = ({"no_cfg_until": 1}, {"guidance_start": 0.25}, {})
    counted, fraction, whole = (
        tensor_of(pipe(SHORT, LONG, guidance_scale=3.0, num_inference_steps=4, seeds=1, output_type="latent", **given))
        for given in ways
    )
    assert torch.equal(counted, fraction)
    assert not torch.equal(counted, whole)


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
def test_rescale_is_diffusers_and_gives_the_deviation_back(phi: float) -> None:
    torch.manual_seed(0)
    v_cond, v_uncond = torch.randn(3, 20, 8) * torch.tensor([1.0, 2.0, 0.1])[:, None, None], torch.randn(3, 20, 8)
    guided = cfg(v_cond, v_uncond, 5.0)
    ours = rescale(guided, v_cond, phi)
    torch.testing.assert_close(ours, rescale_noise_cfg(guided, v_cond, guidance_rescale=phi))
    if phi == 1.0:
        torch.testing.assert_close(ours.std((1, 2)), v_cond.std((1, 2)))


def test_the_pipeline_rescales_each_picture_by_itself(pipe: LibreFluxPipeline) -> None:
    """One step from noise: the last latents are x - v', and v' has the conditional velocity's deviation at phi 1."""
    options: dict[str, Any] = {
        "num_inference_steps": 1,
        "seeds": [1, 2],
        "callback_on_step": lambda step: v.append(step.velocity),
    }
    v: list[torch.Tensor] = []
    for scale, phi in ((1.0, 0.0), (5.0, 0.0), (5.0, 1.0)):
        pipe([SHORT, LONG], "a rocket", guidance_scale=scale, guidance_rescale=phi, **options)
    conditional, guided, rescaled = (one.std((1, 2)) for one in v)
    torch.testing.assert_close(rescaled, conditional)
    assert ((guided - conditional).abs() > 1e-3).all()

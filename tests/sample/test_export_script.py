"""The workflow for ComfyUI and the scheduler for diffusers: the model's shift, and prompts as they are written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from libreflux.flow.schedule import ladder, shift_for_tokens
from libreflux.model.facts import Facts
from libreflux.sample.export_script import comfyui_workflow, diffusers_scheduler

SHIFTS = [1.0, 0.5, 3.0, None]


def nodes(facts: Facts, size: int = 512, **texts: str) -> dict[str, dict[str, Any]]:
    made = comfyui_workflow(facts, transformer="flux.safetensors", size=size, **({"prompt": "a fox"} | texts))
    for node in made.values():
        assert all(value[0] in made for value in node["inputs"].values() if isinstance(value, list))
    return {node["class_type"]: node["inputs"] | {"id": name} for name, node in made.items()}


def simple(sigma: Any, timesteps: int, steps: int) -> list[float]:
    """The ladder of ComfyUI's scheduler `simple` over a table of so many sigmas."""
    table = [sigma((index + 1) / timesteps) for index in range(timesteps)]
    return [table[-(1 + int(step * timesteps / steps))] for step in range(steps)] + [0.0]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("size", [128, 1024])
@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_comfyui_samples_the_models_ladder(shift: float | None, size: int, guidance_embeds: bool) -> None:
    """By what ComfyUI's nodes compute of their inputs, whatever it supposes of a model by itself."""
    found = nodes(Facts(shift=shift, guidance_embeds=guidance_embeds), size)
    tokens = (size // 16) ** 2
    if shift is None:
        node, timesteps = found["ModelSamplingFlux"], 10_000
        slope = (node["max_shift"] - node["base_shift"]) / (4096 - 256)
        mu = node["width"] * node["height"] / 256 * slope + node["base_shift"] - slope * 256
        theirs = simple(lambda t: math.exp(mu) / (math.exp(mu) + 1 / t - 1), timesteps, 28)
    else:
        node, timesteps = found["ModelSamplingAuraFlow"], 1000
        theirs = simple(lambda t: node["shift"] * t / (1 + (node["shift"] - 1) * t), timesteps, 28)
    ours = ladder(28, shift_for_tokens(tokens) if shift is None else shift)
    torch.testing.assert_close(torch.tensor(theirs), ours, rtol=0, atol=4 / timesteps)
    assert node["model"][0] == found["UNETLoader"]["id"]
    assert found["KSampler"]["model"][0] == node["id"]


@pytest.mark.parametrize("prompt", ["a (red) fox", "((nested:1.3)) :)", r"a \(b\) \\ c", "plain", "(", ""])
def test_a_prompt_reaches_comfyuis_encoders_as_it_is(prompt: str) -> None:
    r"""Bare parentheses weigh there; `\(` and `\)` are the signs themselves."""
    for name in ("prompt", "negative"):
        found = comfyui_workflow(Facts(), transformer="f", size=64, **({"prompt": "x"} | {name: prompt}))
        texts = [node["inputs"]["text"] for node in found.values() if node["class_type"] == "CLIPTextEncode"]
        hidden = texts[name == "negative"].replace(r"\)", "\0").replace(r"\(", "\1")
        assert "(" not in hidden
        assert ")" not in hidden
        assert hidden.replace("\0", ")").replace("\1", "(") == prompt


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("own", [{"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_diffusers_follows_the_models_shift(shift: float | None, own: dict[str, Any]) -> None:
    """Whatever scheduler lies in the model's folder; one that has the shift already is left as it is."""
    before = FlowMatchEulerDiscreteScheduler(**own)
    made = diffusers_scheduler(Facts(shift=shift), before)
    for tokens in (64, 4096):
        limits = [made.config[f"{name}_image_seq_len"] for name in ("base", "max")]
        mu = calculate_shift(tokens, *limits, made.config.base_shift, made.config.max_shift)
        made.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
        expected = ladder(4, shift_for_tokens(tokens) if shift is None else shift)
        torch.testing.assert_close(made.sigmas, expected, rtol=1e-5, atol=1e-6)
    same = own.get("use_dynamic_shifting", False) if shift is None else own == {"shift": shift}
    assert (made is before) == same

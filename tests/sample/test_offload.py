"""diffusers' ways of holding less on the device, on this pipeline: with the CPU in the GPU's place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import accelerate
import pytest
import torch

from libreflux.sample.pipeline import LibreFluxPipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize("padding", ["drop", "keep"])
@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloading_draws_the_same_bits(
    tiny_model_dir: Path, way: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = accelerate.cpu_offload
    # accelerate tells "cpu:0", which diffusers makes of "cpu", from "cpu".
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, _, **options: own(part, CPU, **options))
    plain, offloaded = (LibreFluxPipeline.from_pretrained(tiny_model_dir) for _ in range(2))
    getattr(offloaded, f"enable_{way}_cpu_offload")(device="cpu")
    pictures = []
    for pipe in (plain, offloaded, offloaded):
        pipe.set_progress_bar_config(disable=True)
        pipe.facts = dataclasses.replace(pipe.facts, text_padding=padding, max_tokens=12)
        pictures.append(pipe(["a fox", "a red apple on blue"], "a rocket", seeds=1, num_inference_steps=2).images)
    first, *others = ([image.tobytes() for image in images] for images in pictures)
    assert all(images == first for images in others)
    weights = [
        one.device.type
        for part in offloaded.components.values()
        if isinstance(part, torch.nn.Module)
        for one in part.parameters()
    ]
    assert set(weights) == ({"meta"} if way == "sequential" else {"cpu"})

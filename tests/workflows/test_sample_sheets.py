"""The VAE of the sample sheets is on the device while a sheet is drawn, and not while the run trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from libreflux.recipe import Recipe
from libreflux.workflows import run_record
from tiny import tiny_transformer


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Recipe:
    samples = {"prompts": ["a fox", "a rocket"], "guidance": [1]}
    data = [{"path": str(tmp_path)}]
    tree = {"model": str(tiny_model_dir), "data": data, "resolution": 32, "steps": 1, "out": str(tmp_path / "run")}
    return Recipe.model_validate({**tree, "samples": samples})


@pytest.mark.parametrize("fails", [False, True])
def test_the_vae_leaves_the_device_between_sheets(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A card is stood in for by the meta device: what is told to move where is written down, and a fake draws."""
    told: list[str] = []

    class Drawing:
        def __init__(self, vae: AutoencoderKL, **_: Any) -> None: ...
        def set_progress_bar_config(self, **_: Any) -> None: ...

        def __call__(self, **_: Any) -> Any:
            told.append("draws")
            if fails:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return type("Output", (), {"images": [Image.new("RGB", (32, 32))]})

    class Texts:
        def __init__(self, folder: Path) -> None: ...
        def text(self, prompts: list[str]) -> None: ...

    monkeypatch.setattr(run_record, "LibreFluxPipeline", Drawing)
    monkeypatch.setattr(run_record, "Cache", Texts)
    monkeypatch.setattr(run_record, "release", lambda device: told.append(f"releases {device}"))

    def moved(vae: AutoencoderKL, device: object, **_: object) -> AutoencoderKL:
        told.append(str(device))
        return vae

    monkeypatch.setattr(AutoencoderKL, "to", moved)
    shown, transformer = run_record.RunRecorder(recipe), tiny_transformer().to("meta")
    told.clear()
    for _ in range(2):
        if fails:
            with pytest.raises(torch.OutOfMemoryError):
                shown.sample_sheet(transformer)
        else:
            shown.sample_sheet(transformer)
    drawn = ["draws"] if fails else ["draws", "draws"]
    sheet = ["meta", *drawn, "cpu", "releases meta"]
    assert told[-2 * len(sheet) :] == 2 * sheet  # before them, the VAE is loaded on the CPU

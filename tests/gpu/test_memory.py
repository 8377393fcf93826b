"""What the card's memory is used for: offloads under a cap, beyond it one line, and the estimate against the peak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpu.alone import DEVICE, Capped, alone, capped, last_line
from gpu.recipes import tree

pytestmark = pytest.mark.usefixtures("needs_card")

DRAW = ["--guidance", 3, "--steps", 2, "--width", 256, "--height", 256, "--device", DEVICE]
WAYS = ["none", "auto", "model", "sequential"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model"
    alone("models.build", out=path)
    return path


def _draw(model: Path, way: str, folder: Path, cap: int | None) -> Capped:
    command = ["generate", "a red apple on blue", "--model", model, *DRAW, "--offload", way]
    return capped(*command, "--out", folder / f"{way}.png", cap=cap, note=folder / "peak")


@pytest.fixture(scope="module")
def peaks(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes that each offload takes where there is enough."""
    found = {}
    for way in WAYS:
        done = _draw(large, way, tmp_path_factory.mktemp(way), None)
        assert done.code == 0, done.log()
        found[way] = done.peak
    return found


def test_each_offload_takes_less(peaks: dict[str, int]) -> None:
    assert peaks["sequential"] < 0.8 * peaks["model"], peaks
    assert max(peaks["auto"], peaks["model"]) < 0.9 * peaks["none"], peaks


@pytest.mark.parametrize(("fits", "too_large"), [("model", "none"), ("auto", "none"), ("sequential", "model")])
def test_an_offload_fits_where_what_keeps_more_is_refused_in_one_line(
    fits: str, too_large: str, peaks: dict[str, int], large: Path, tmp_path: Path
) -> None:
    cap = (peaks[fits] + peaks[too_large]) // 2
    drawn = _draw(large, fits, tmp_path, cap)
    assert drawn.code == 0, drawn.log()
    assert (tmp_path / f"{fits}.png").is_file(), drawn.log()
    refused = _draw(large, too_large, tmp_path, cap)
    line = last_line(refused)
    assert refused.code in (1, 2), refused.log()
    assert "out of memory; hint: " in line, refused.log()
    assert not (tmp_path / f"{too_large}.png").exists()


def test_training_beyond_the_cap_is_one_line_and_goes_on_under_a_larger_one(
    large: Path, photos: Path, tmp_path: Path
) -> None:
    recipe = tree("tiny", "lokr", "bf16", "adamw", {"tiny": large, "photos": photos, "out": tmp_path / "run"})
    path = tmp_path / "recipe.json"  # JSON is YAML
    path.write_text(json.dumps({**recipe, "device": DEVICE, "held_out": {}, "save": {"every": 2}, "resolution": 128}))

    def train(steps: int, cap: int | None) -> Capped:
        return capped("train", path, f"steps={steps}", cap=cap, note=tmp_path / "peak")

    first = train(2, None)
    assert first.code == 0, first.log()
    refused = train(4, int(0.6 * first.peak))
    line = last_line(refused)
    assert refused.code in (1, 2), refused.log()
    assert "out of memory; hint: " in line, refused.log()
    again = train(4, int(1.2 * first.peak))
    assert again.code == 0, again.log()
    assert "resumes after step 2" in again.err, again.log()


@pytest.mark.parametrize("base", ["bf16", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_near_the_peak(
    base: str, checkpointing: bool, large: Path, photos: Path, tmp_path: Path
) -> None:
    """256 px and a batch of 8: a card's own workspaces are small beside it."""
    places = {"tiny": large, "photos": photos, "out": tmp_path / "run"}
    changes: dict[str, Any] = {
        "resolution": 256,
        "batch": 8,
        "gradient_checkpointing": checkpointing,
        "device": DEVICE,
        "ema": [],
    }
    recipe = tree("tiny", "lokr", base, "adamw_bf16", places, held_out={}, **{**changes, "steps": 3})
    found = alone("training.peak", recipe=recipe)
    assert found["peak"] == pytest.approx(found["estimate"], rel=0.25), found

"""Drawing while blocks wait in RAM: the same pictures, refusals, and a number that follows from the free memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import libreflux
from libreflux.adapter.adapter import attach
from libreflux.adapter.io import save_adapter
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import RecipeError
from libreflux.model import offload
from libreflux.model.int8 import quantise_model
from libreflux.sample.metadata import GenerationRecord
from libreflux.training import trace
from libreflux.workflows import drawing_blocks
from libreflux.workflows.drawing_blocks import activations, let_wait
from tiny import tiny_transformer, tiny_vae

BLOCKS = 3  # of the tiny model
GIVEN: dict[str, Any] = {"negative": "a rocket", "steps": 2, "guidance": 3.0, "device": "cpu"}
CPU = torch.device("cpu")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in a card's place; what is away is NaN."""
    monkeypatch.setattr(offload, "DEVICES", ["cuda", "cpu"])
    monkeypatch.setattr(
        offload, "at_rest", lambda home: torch.full_like(home, 101 if home.dtype == torch.int8 else torch.nan)
    )


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_transformer()
    adapter = attach(made, resolve(linear_shapes(made), [Target(layers="**.attn.**", factor=4)]), scale=0.3)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_adapter(adapter, path)
    return path


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"offload": "none"}], ids=["plain", "int8", "none"])
def test_pictures_are_the_same_bits(
    tiny_model_dir: Path, tmp_path: Path, adapter_file: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing_blocks, "free_memory", lambda _: 0)
    given = {"model": tiny_model_dir, "adapters": adapter_file, **GIVEN, **options}
    prompts = ["a fox", "a red apple on blue"]
    plain = libreflux.generate(prompts, **given)
    waiting = libreflux.generate(prompts, **given, offload_blocks=BLOCKS)
    for one, other in zip(plain.pictures, waiting.pictures, strict=True):
        assert one.image is not None
        assert other.image is not None
        assert one.image.tobytes() == other.image.tobytes()
        assert one.record == other.record  # what waits decides no bit: no picture says it
    libreflux.generate("a fox", **given, out=tmp_path / "fox.png")
    again = libreflux.remake(tmp_path / "fox.png", device="cpu", offload_blocks="auto", adapters=adapter_file)
    assert again.same_pixels


@pytest.mark.usefixtures("stand_in")
def test_a_grid_lets_blocks_wait(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    own = drawing_blocks.let_wait
    monkeypatch.setattr(drawing_blocks, "let_wait", lambda *given: counts.append(own(*given)))
    given: dict[str, Any] = {"model": tiny_model_dir, "guidance": [1, 3], "steps": [1], "device": "cpu"}
    sheets = [
        libreflux.grid(["a fox"], **given, offload_blocks=blocks, out=tmp_path / str(blocks)).sheet.read_bytes()
        for blocks in (0, BLOCKS)
    ]
    assert sheets[0] == sheets[1]
    assert counts == [BLOCKS]


def test_what_does_nothing_is_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(told: str, **options: Any) -> None:
        with pytest.raises(RecipeError, match=told):
            libreflux.generate("a fox", model=tiny_model_dir, device="cpu", **options)

    refused("^offload_blocks: is of no use on cpu", offload_blocks=3)
    refused("^offload_blocks: has no effect beside `offload` model", offload_blocks="auto", offload="model")
    for wrong in (-1, 1.5, "many", True):
        refused("^offload_blocks: cannot be", offload_blocks=wrong)
    monkeypatch.setattr(offload, "DEVICES", ["cpu"])
    refused("^offload_blocks: 4 cannot wait, the model has 3 blocks", offload_blocks=4)
    refused("^offload_blocks: 2 would save nothing", offload_blocks=2)


def record_of(guidance: float, width: int, height: int) -> GenerationRecord:
    return GenerationRecord(
        prompt="a fox", seed=1, steps=1, guidance=guidance, model="tiny", width=width, height=height
    )


def test_auto_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, record = tiny_vae(), record_of(3.0, 32, 48)
    made = tiny_transformer().requires_grad_(False)
    held, beside = trace.weights_of(made), activations(made, vae, [record], 8)

    def count(free: float) -> int:
        monkeypatch.setattr(drawing_blocks, "free_memory", lambda _: free)
        return let_wait(tiny_transformer().requires_grad_(False), "auto", vae, [record], 8, CPU)

    assert count(0) == 0  # on a CPU
    monkeypatch.setattr(offload, "DEVICES", ["cpu"])
    blocks = [offload.frozen_sizes(block) for block in offload.blocks_of(made)]
    assert offload.saved_bytes(blocks, BLOCKS) > 0
    whole = drawing_blocks.CARD_RESERVE * (held + beside + drawing_blocks.libraries(False, beside))
    assert count(whole + 1) == 0
    assert count(whole - 1) == BLOCKS


def test_the_largest_picture_decides() -> None:
    made, vae = tiny_transformer(), tiny_vae()
    small = record_of(1.0, 32, 32)
    large = record_of(1.0, 512, 512)
    alone, both = activations(made, vae, [small], 8), activations(made, vae, [small, large], 8)
    assert both > 10 * alone
    quantise_model(made)
    assert activations(made, vae, [small], 400) > alone

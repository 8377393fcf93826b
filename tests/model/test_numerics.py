"""What is pinned on CUDA: flags of torch that can be read and set without a card."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from libreflux.errors import RunError
from libreflux.model import numerics
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from tiny import tiny_transformer


def flags() -> dict[str, Any]:
    matmul = torch.backends.cuda.matmul
    return {
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "products": torch.get_float32_matmul_precision(),
        "products in TF32": matmul.allow_tf32,
        "convolutions in TF32": torch.backends.cudnn.allow_tf32,
        "timed choice": torch.backends.cudnn.benchmark,
        "bf16 sums": matmul.allow_bf16_reduced_precision_reduction,
    }


@pytest.fixture
def others_choice() -> Iterator[dict[str, Any]]:
    """Flags that a user, or another library, set for speed."""
    numerics_before = numerics.Flags()
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    yield flags()
    numerics_before.put_back()


def test_gradients_are_kept_from_cudnn_and_fp32_is_fp32(others_choice: dict[str, Any]) -> None:
    with numerics.pinned("cuda"):
        inside = flags()
    assert inside == {
        "cudnn attention": False,
        "flash": True,
        "efficient": True,
        "math": True,
        "products": "highest",
        "products in TF32": False,
        "convolutions in TF32": False,
        "timed choice": False,
        "bf16 sums": False,
    }
    assert flags() == others_choice  # and both names of torch can still be read


def test_a_drawing_leaves_attention_as_it_is(others_choice: dict[str, Any]) -> None:
    with numerics.pinned("cuda", drawing=True):
        assert flags()["cudnn attention"]
        assert not flags()["convolutions in TF32"]
        with numerics.pinned("cuda"), numerics.pinned("cuda", drawing=True):
            assert not flags()["cudnn attention"]  # a sample sheet of a training run
    assert flags() == others_choice


def test_nothing_is_touched_for_a_cpu(others_choice: dict[str, Any]) -> None:
    with numerics.pinned("cpu"):
        assert flags() == others_choice


def test_flags_set_by_torchs_newer_names_come_back(others_choice: dict[str, Any]) -> None:
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch sets it without a declaration
    conv.fp32_precision = "ieee"  # the older name cannot be read now
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with numerics.pinned("cuda"):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert conv.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The CPU is taken for a card: at each attention call, whether cuDNN may be chosen."""
    seen: list[bool] = []
    real: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    pinned = numerics.pinned
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(numerics, "pinned", lambda device, **options: pinned("cuda", **options))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True, "diffusers' own"])
def test_every_forward_pass_that_a_gradient_goes_through_is_pinned(checkpointing: bool | str, pins: list[bool]) -> None:
    transformer = tiny_transformer().train()
    if checkpointing == "diffusers' own":
        transformer.enable_gradient_checkpointing()
    elif checkpointing:
        numerics.enable_checkpointing(transformer)
    text = TextConditioning([torch.randn(3, 24), torch.randn(5, 24)], torch.randn(2, 16))
    x = pack(torch.randn(2, 16, 4, 4))
    out = velocity(transformer, x, torch.tensor([0.3, 0.6]), text, image_ids(4, 4))
    forward = len(pins)
    out.square().mean().backward()  # outside of the call: checkpointing computes the blocks again in here
    assert (forward, len(pins)) == (3, 6 if checkpointing else 3)
    assert not any(pins)
    with torch.no_grad():
        velocity(transformer, x, torch.tensor([0.3, 0.6]), text, image_ids(4, 4))
    assert pins[-3:] == [True] * 3  # a drawing takes what torch takes


def test_a_checkpointing_function_of_somebody_elses_stays() -> None:
    transformer = tiny_transformer()

    def own(block: torch.nn.Module, *args: Any) -> Any:
        return block(*args)

    transformer.enable_gradient_checkpointing(own)
    numerics.pin_checkpointing(transformer)
    assert transformer._gradient_checkpointing_func is own


def test_deterministic_asks_for_both_and_puts_torch_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(numerics.WORKSPACE, raising=False)
    with numerics.deterministic("cuda"):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[numerics.WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    with numerics.deterministic("cpu"):
        assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_too_late_or_impossible_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(numerics.WORKSPACE, raising=False)
    with monkeypatch.context() as used:
        used.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RunError, match=r"before.*hint: set CUBLAS_WORKSPACE_CONFIG=:4096:8"):
            numerics.deterministic("cuda").__enter__()
    refused = pytest.raises(RunError, match=r"^deterministic: put_ does not have .*; hint: set deterministic: false")
    with refused, numerics.deterministic("cuda"):
        torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))  # torch knows no other on any device
    with pytest.raises(RuntimeError, match="another"), numerics.deterministic("cuda"):
        raise RuntimeError("another fault")

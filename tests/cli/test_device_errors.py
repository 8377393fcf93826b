"""A card that fails, or has no memory left, ends every verb in one line; what it had finished is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import T5EncoderModel

from libreflux.training.step import Training

ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in the documentation.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
NO_MEMORY = "CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has a total capacity of 5.92 GiB.\nSee the docs."
FAILURES = {
    "illegal access": (torch.AcceleratorError(ILLEGAL, 700), 1, "an illegal memory access was encountered"),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(x)`"), 1, "CUBLAS"),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), 1, "CUDNN_STATUS_EXECUTION_FAILED"),
    "memory": (torch.OutOfMemoryError(NO_MEMORY), 2, "out of memory; hint: "),
    "memory of cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), 2, "out of memory"),
}


@pytest.fixture(params=["illegal access", "memory"])
def failure(request: pytest.FixtureRequest) -> tuple[Exception, int, str]:
    return FAILURES[request.param]


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def one_line(err: str) -> str:
    [line] = [line for line in err.splitlines() if line.startswith("libreflux: error: ")]
    assert err.endswith(f"{line}\n")
    assert "Traceback" not in err
    assert "hint" in line
    return line


@pytest.mark.parametrize("kind", FAILURES)
def test_drawing(
    run: Callable, tiny_model_dir: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, code, said = FAILURES[kind]
    monkeypatch.setattr(FluxTransformer2DModel, "forward", failing(error))
    size = ("--width", 32, "--height", 48, "--steps", 2)
    result = run("generate", "a fox", "--model", tiny_model_dir, *size, "--out", tmp_path / "a.png")
    line = one_line(result.err)
    assert result.code == code
    assert said in line
    assert "drawing 32 x 48 pixels on cpu" in line
    assert not (tmp_path / "a.png").exists()


def test_training_and_going_on(
    run: Callable, recipe: Path, tmp_path: Path, failure: tuple[Exception, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error, code, said = failure
    common = ["train", recipe, "samples.every=0", "save.every=1", "steps=3"]
    real = Training.take_step

    def second(self: Training) -> Any:
        return failing(error)() if self.step == 1 else real(self)

    with monkeypatch.context() as broken:
        broken.setattr(Training, "take_step", second)
        result = run(*common, f"out={tmp_path / 'run'}")
    line = one_line(result.err)
    assert result.code == code
    assert said in line
    assert "step 2, batch 2, resolution 32" in line
    assert code == 2 or "goes on from the last checkpoint" in line
    again = run(*common, f"out={tmp_path / 'run'}")
    assert again.code == 0
    assert "resumes after step 1" in again.err
    assert run(*common, f"out={tmp_path / 'whole'}").code == 0
    whole, resumed = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "run"))
    assert whole == resumed


def test_preparing(
    run: Callable,
    tiny_model_dir: Path,
    pictures: Path,
    tmp_path: Path,
    failure: tuple[Exception, int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, code, said = failure
    for number, (part, name) in enumerate(((AutoencoderKL, "encode"), (T5EncoderModel, "forward"))):
        with monkeypatch.context() as broken:
            broken.setattr(part, name, failing(error))
            out = tmp_path / str(number)
            result = run("prepare", pictures, "--model", tiny_model_dir, "--resolution", 32, "--out", out)
        assert result.code == code
        assert said in one_line(result.err)
    done = run("prepare", pictures, "--model", tiny_model_dir, "--resolution", 32, "--out", tmp_path / "1")
    assert done.code == 0, done.err  # and what was encoded before the failure stays


def test_probing(
    run: Callable,
    tiny_model_dir: Path,
    pictures: Path,
    tmp_path: Path,
    failure: tuple[Exception, int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, code, said = failure
    monkeypatch.setattr(FluxTransformer2DModel, "forward", failing(error))
    common = ("--quick", "--pictures", 2, "--prompts", 2, "--resolution", 32)
    result = run("probe", tiny_model_dir, "--data", pictures, *common, "--out", tmp_path / "probe")
    line = one_line(result.err)
    assert result.code == code
    assert said in line
    assert "resolution 32" in line
    assert code == 2 or "finished sections are kept" in line


def test_a_verb_that_says_nothing_of_its_own(
    run: Callable,
    tiny_model_dir: Path,
    trained: Path,
    tmp_path: Path,
    failure: tuple[Exception, int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, code, said = failure
    monkeypatch.setattr(torch, "kron", failing(error))
    result = run("merge", tiny_model_dir, trained, "--out", tmp_path / "merged")
    line = one_line(result.err)
    assert result.code == code
    assert said in line
    assert line.startswith("libreflux: error: merge: ")
    assert not (tmp_path / "merged").exists()


def test_the_traceback_is_there_for_who_asks(
    run: Callable, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBREFLUX_TRACEBACK", "1")
    monkeypatch.setattr(FluxTransformer2DModel, "forward", failing(FAILURES["cuDNN"][0]))
    with pytest.raises(Exception, match="the device failed") as raised:
        run("generate", "a fox", "--model", tiny_model_dir, "--out", tmp_path / "a.png")
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_bug_of_ours_keeps_its_traceback(
    run: Callable, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FluxTransformer2DModel, "forward", failing(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run("generate", "a fox", "--model", tiny_model_dir, "--out", tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["memory", "illegal access"])
def test_reading_a_model(
    run: Callable, tiny_model_dir: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading goes straight to the card: what fails there is no damaged file."""
    error, code, said = FAILURES[kind]
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", failing(error))
    result = run("generate", "a fox", "--model", tiny_model_dir, "--out", tmp_path / "a.png")
    line = one_line(result.err)
    assert result.code == code
    assert said in line
    assert "reading" in line
    assert "damaged" not in line

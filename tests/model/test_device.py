"""Each process has its own card; a GPU that torch cannot use is named, with the hint that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from libreflux.errors import RunError
from libreflux.model import device
from libreflux.model.device import idle_gpu, make_current, pick_device

NVIDIA = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\nGCC version:  x\n"
NO_GPU_BUILD, FOR_CUDA, FOR_ROCM = (None, None), ("13.0", None), (None, "7.1")


def machine(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(NVIDIA if file.endswith("version") else "")
    return root


@pytest.mark.parametrize(
    ("files", "built_for", "named", "hint"),
    [
        (
            ["proc/driver/nvidia/version", "dev/nvidia0"],
            NO_GPU_BUILD,
            "NVIDIA GPU: it is built without CUDA",
            "for CUDA",
        ),
        (["dev/nvidia0"], NO_GPU_BUILD, "NVIDIA GPU: it is built without CUDA", "install torch for CUDA"),
        (["usr/lib/wsl/lib/libcuda.so.1"], NO_GPU_BUILD, "NVIDIA GPU: it is built without CUDA", "for CUDA"),
        (
            ["proc/driver/nvidia/version", "dev/nvidia0"],
            FOR_CUDA,
            "13.0 does not start with its driver 470.82.01",
            "older",
        ),
        (
            ["proc/driver/nvidia/version", "dev/nvidia1"],
            FOR_CUDA,
            "13.0 does not start with its driver 470.82.01",
            "older",
        ),
        (["proc/driver/nvidia/version"], FOR_CUDA, "no /dev/nvidia*", "--gpus all"),
        (["usr/lib/wsl/lib/libcuda.so.1"], FOR_CUDA, "CUDA 13.0 does not start with its driver", "update the driver"),
        (["dev/kfd"], NO_GPU_BUILD, "an AMD GPU: it is built without ROCm", "install torch for ROCm"),
        (["dev/kfd"], FOR_ROCM, "an AMD GPU", "group render"),
    ],
)
def test_signs_of_a_gpu(
    tmp_path: Path, files: list[str], built_for: tuple[str | None, str | None], named: str, hint: str
) -> None:
    found = idle_gpu(machine(tmp_path, *files), path=str(tmp_path), built_for=built_for)
    assert found is not None
    assert named in found[0]
    assert hint in found[1]


def test_nvidia_smi_is_a_sign_and_nothing_is_none(tmp_path: Path) -> None:
    assert idle_gpu(tmp_path, path=str(tmp_path), built_for=NO_GPU_BUILD) is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    found = idle_gpu(tmp_path, path=str(tmp_path), built_for=NO_GPU_BUILD)
    assert found is not None
    assert "NVIDIA" in found[0]


@pytest.fixture
def cardless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with an NVIDIA card and a torch without CUDA."""
    root, real = machine(tmp_path, "dev/nvidia0"), idle_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(device, "idle_gpu", lambda: real(root, built_for=NO_GPU_BUILD))
    for kind in ("CUDA", "HIP", "ROCR"):
        monkeypatch.delenv(f"{kind}_VISIBLE_DEVICES", raising=False)
    device.warn_of_idle_gpu.cache_clear()
    yield
    device.warn_of_idle_gpu.cache_clear()


def test_auto_says_so_once_and_goes_on(cardless: None, caplog: pytest.LogCaptureFixture) -> None:
    assert [pick_device(), pick_device("auto"), pick_device("cpu")] == [torch.device("cpu")] * 3
    (record,) = caplog.records
    assert "torch cannot use an NVIDIA GPU: it is built without CUDA" in record.getMessage()
    assert "; hint: install torch for CUDA" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_who_hides_the_card_is_not_told(
    cardless: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pick_device() == torch.device("cpu")
    assert not caplog.records
    with pytest.raises(RunError, match="this machine has no cuda; hint: use auto or cpu"):
        pick_device("cuda")


def test_who_asks_for_the_card_is_told_why_not(cardless: None) -> None:
    with pytest.raises(RunError, match=r"torch cannot use an NVIDIA GPU: .*; hint: install torch for CUDA"):
        pick_device("cuda")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.device]]:
    """A machine with some cards, in a process of torchrun's; the devices that became the current one are listed."""

    def made(count: int, rank: int | str | None = None, processes: int | None = None) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        for name, value in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", processes)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))
        return current

    return made


def test_each_process_has_its_own_card(cards: Callable[..., list[torch.device]]) -> None:
    for rank in range(4):
        current = cards(4, rank, 4)
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", rank)
        assert pick_device("cpu") == torch.device("cpu")
        make_current(pick_device("cuda"))
        make_current("cpu")
        assert current == [torch.device("cuda", rank)]


def test_without_torchrun_a_card_is_what_it_is_called(cards: Callable[..., list[torch.device]]) -> None:
    current = cards(2)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    for name in ("cuda", "cuda:1"):
        make_current(pick_device(name))
    assert current == [torch.device("cuda:1")]
    cards(2, 0, 1)
    assert [str(pick_device(name)) for name in ("auto", "cuda:1")] == ["cuda:0", "cuda:1"]


def test_one_card_for_several_processes_is_refused(cards: Callable[..., list[torch.device]]) -> None:
    for rank in range(2):
        cards(2, rank, 2)
        with pytest.raises(RunError, match=r"^device: cuda:1 for 2 processes on this machine; hint: set device: cuda$"):
            pick_device("cuda:1")


def test_more_processes_than_cards_are_refused_by_all(cards: Callable[..., list[torch.device]]) -> None:
    for rank, name in ((0, "auto"), (3, "cuda")):
        cards(2, rank, 4)
        with pytest.raises(
            RunError, match=r"4 processes, but 2 cards on this machine; hint: .*--nproc_per_node=2(, or|$)"
        ):
            pick_device(name)
    cards(1, 1)  # a launcher that does not say how many
    with pytest.raises(RunError, match="2 processes, but 1 card on"):
        pick_device("cuda")


def test_a_torn_environment_is_refused(cards: Callable[..., list[torch.device]]) -> None:
    cards(1, "first")
    with pytest.raises(RunError, match="LOCAL_RANK and LOCAL_WORLD_SIZE are not numbers; hint: start it by torchrun"):
        pick_device()

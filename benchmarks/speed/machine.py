"""The machine: its names and versions, and its own measured limits: products in bf16 and int8, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.timing import median_seconds

PACKAGES = ("diffusers", "transformers", "optimum-quanto", "lycoris-lora", "torchao", "peft", "bitsandbytes")
SHAPES = ((320, 3072, 12288), (1088, 3072, 12288), (1088, 12288, 3072), (1088, 3072, 3072))
LARGE = ((4160, 3072, 12288), (4160, 12288, 3072), (8192, 8192, 8192))
SMALL = ((64, 256, 1024), (64, 1024, 256))
Shape = tuple[int, int, int]
"""Rows of x, in_features, out_features."""


def described(device: str) -> dict[str, Any]:
    """What measured figures depend on."""
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory_bytes(device) / 2**30, 1),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__} | {name: version for name in PACKAGES if (version := _version(name))},
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    file = Path("/proc/cpuinfo")
    rows = file.read_text(errors="replace").splitlines() if file.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def room_bytes(device: str) -> float:
    """What contenders may hold together unless told otherwise: a part of what is free now."""
    if device == "cuda":
        return 0.8 * torch.cuda.mem_get_info()[0]
    import psutil

    return 0.6 * psutil.virtual_memory().available


def limits(device: str, size: str) -> dict[str, Any]:
    """Products a second by shape, in bf16 and int8 (10^12 operations), and 10^9 bytes a second of a copy."""
    shapes: Sequence[Shape] = SMALL if size == "emoji" else (*SHAPES, *LARGE) if device == "cuda" else SHAPES
    rows = [{"shape": list(shape), **_products(shape, device)} for shape in shapes]
    found: dict[str, Any] = {"products": rows, "copy_gb_s": _copied(device, 2**24 if size == "emoji" else 2**28)}
    for kind in ("bf16", "int8", "fp8"):
        speeds = [row[kind] for row in rows if isinstance(row.get(kind), float)]
        found[kind] = max(speeds) if speeds else None
    return found


def _products(shape: Shape, device: str) -> dict[str, float | str]:
    rows, inner, outer = shape
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
    x8, weight8 = (torch.randint(-127, 128, one.shape, dtype=torch.int8, device=device) for one in (x, weight))
    work: dict[str, Any] = {
        "bf16": lambda: torch.nn.functional.linear(x, weight),
        "int8": lambda: torch._int_mm(x8, weight8.t()),
    }
    if device == "cuda":
        e4m3 = torch.float8_e4m3fn
        x_f8, weight_f8 = x.to(e4m3), weight.to(e4m3)
        scales = torch.ones(rows, 1, device=device), torch.ones(1, outer, device=device)
        work["fp8"] = lambda: torch._scaled_mm(
            x_f8, weight_f8.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16
        )
    found: dict[str, float | str] = {}
    for name, product in work.items():
        try:
            found[name] = 2e-12 * rows * inner * outer / median_seconds(product, device)
        except RuntimeError as error:  # this card or version has no such product
            found[name] = str(error).splitlines()[0][:100]
    return found


def _copied(device: str, numbers: int) -> float:
    """Read and written bytes, in 10^9 a second."""
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    return 2e-9 * 4 * numbers / median_seconds(lambda: target.copy_(source), device)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

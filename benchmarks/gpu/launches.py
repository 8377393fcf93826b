"""Where a training pass of the whole FLUX.1 spends a card's time: kernels by seconds and launches, and the host's side.

    python3 benchmarks/gpu/launches.py [--base int8|bf16|w8a8] [--device cpu --size emoji]

One profiled step at each of the size's pictures, after one that warms up.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from benchmarks.speed import passes
from benchmarks.speed.parts import CAPTION
from benchmarks.speed.sizes import SIZES
from benchmarks.speed.timing import Run, free, wait


def shown(run: Run, device: str, most: int) -> list[str]:
    """The profile of one run, as lines."""
    run()
    wait(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        begun = time.perf_counter()
        run()
        wait(device)
        wall = time.perf_counter() - begun
    rows: list[Any] = list(profiler.key_averages())
    kernels = [row for row in rows if str(row.device_type).endswith("CUDA")]
    host = [row for row in rows if row not in kernels]
    busy = sum(row.self_device_time_total for row in kernels) / 1e6
    lines = [f"{wall:.3f} s, profiled; {busy:.3f} s of kernels in {sum(row.count for row in kernels):,} launches"]
    for row in sorted(kernels, key=lambda row: -row.self_device_time_total)[:most]:
        lines.append(f"  {row.self_device_time_total / 1e3:8.1f} ms  {row.count:6,} times  {row.key[:110]}")
    for row in sorted(host, key=lambda row: -row.self_cpu_time_total)[:most]:
        lines.append(f"  host {row.self_cpu_time_total / 1e3:8.1f} ms  {row.count:6,} times  {row.key[:80]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=passes.BASES, default="int8")
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--most", type=int, default=14, help="rows of each kind")
    options = parser.parse_args()
    size = SIZES[options.size]
    for side in size.sides:
        run = passes.own_step(size, side, CAPTION, options.device, options.base)
        print(f"training step, ours {options.base}, {side} px: ", end="")
        print("\n".join(shown(run, options.device, options.most)), flush=True)
        del run
        free(options.device)


if __name__ == "__main__":
    main()

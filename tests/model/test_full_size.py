"""benchmarks/full_size.py runs: what it claims of 12 B parameters is made by this code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_full_size_benchmark_in_the_small(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.full_size", "--folder", str(tmp_path / "model"), "--tiny"]
    done = subprocess.run([*command, "--size", "32"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for told in ("| peak of all |", "| share of matmul speed |", "picture (32, 32)"):
        assert told in done.stdout
    assert not (tmp_path / "model").exists()

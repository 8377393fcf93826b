"""What one process cannot show: fresh ones, with other hash seeds, write the same bytes; one is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from libreflux import files


def start(hash_seed: int, *args: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "libreflux", *map(str, args)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def test_a_killed_command_run_again_ends_like_one_that_was_not(recipe: Path, tmp_path: Path) -> None:
    common = ["train", recipe, "steps=40", "save.every=5", "save.keep=100", "samples.every=0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(1, *common, f"out={whole}").wait(300) == 0
    victim = start(2, *common, f"out={killed}")
    began = time.monotonic()
    while not (killed / "checkpoints" / "step-00000010").exists() and time.monotonic() < began + 300:
        assert victim.poll() is None
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (killed / "adapter.safetensors").exists()
    assert start(3, *common, f"out={killed}").wait(300) == 0
    for name in ("adapter.safetensors", "checkpoints/step-00000040/optimizer.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_draw_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        out = tmp_path / f"{number}.png"
        command = ["generate", "a red apple on blue", "--model", tiny_model_dir, "--seed", 1, "--out", out]
        assert start(number, *command).wait(300) == 0
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_a_second_trainer_is_refused_before_anything_heavy_is_imported(recipe: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom libreflux.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    with files.lock(tmp_path / "run"):
        command = [sys.executable, "-c", code, "train", str(recipe), f"out={tmp_path / 'run'}"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (second.returncode, second.stdout.strip()) == (2, "False")
    assert f"in use by process {os.getpid()}" in second.stderr
    assert second.stderr.count("\n") == 1

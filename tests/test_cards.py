"""Where the suite runs: no test sees a card unless the tests for one are asked for, and `make test-gpu` does that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDDEN, GIVEN = "-1", "0"

WATCHED = """
import os, sys

def visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("HIP_VISIBLE_DEVICES")

seen = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen.append(visible())

assert "torch" not in sys.modules
sys.meta_path.insert(0, Watch())
import pytest
code = pytest.main([*sys.argv[1:], "--collect-only", "-q", "-p", "no:cacheprovider"])
print("when torch comes:", *seen)
print("at the end:", visible())
sys.exit(code)
"""


def collected(*arguments: str) -> list[str]:
    """What a run of pytest says that is started where CUDA_VISIBLE_DEVICES is 0, as on a machine with one card."""
    environment = {name: value for name, value in os.environ.items() if name != "HIP_VISIBLE_DEVICES"}
    environment["CUDA_VISIBLE_DEVICES"] = GIVEN
    command = [sys.executable, "-c", WATCHED, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_cards_are_hidden_before_torch_is_imported() -> None:
    said = collected("tests/model/test_device.py")
    assert any(line.startswith("tests/model/test_device.py::") for line in said)
    assert said[-2:] == [f"when torch comes: ('{HIDDEN}', '{HIDDEN}')", f"at the end: ('{HIDDEN}', '{HIDDEN}')"]


def test_tests_for_a_card_are_left_out_unless_asked_for_and_then_see_it() -> None:
    both = ("tests/test_seeding.py", "tests/gpu/test_faults.py")
    said, asked = collected(*both), collected(*both, "-m", "gpu")
    names = [{line.partition("::")[0] for line in lines if "::" in line} for lines in (said, asked)]
    assert names == [{both[0]}, {both[1]}]
    assert asked[-1] == f"at the end: ('{GIVEN}', None)"


def test_this_process_sees_no_card_and_its_children_neither() -> None:
    import torch

    assert os.environ["CUDA_VISIBLE_DEVICES"] == HIDDEN
    assert not torch.cuda.is_available()
    code = "import torch; print(torch.cuda.device_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout == "0\n"


@pytest.mark.parametrize(("given", "python"), [([], ".venv/bin/python"), (["PY=python3"], "python3")])
def test_make_runs_them_with_the_python_given_and_then_installs_nothing(given: list[str], python: str) -> None:
    command = ["make", "--dry-run", "--always-make", "test-gpu", *given]
    environment = {name: value for name, value in os.environ.items() if name not in ("PY", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"{python} -m pytest -m gpu tests/gpu")
    assert ("pip install" in done.stdout) is not bool(given)

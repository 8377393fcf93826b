"""What every test shares: two threads, no network, no card unless `-m gpu` asks for it, and one tiny model."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

# Here, and not in pytest_configure: the conftest.py of a folder below may import torch before that is called.
CARDS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # NVIDIA's and AMD's; child processes inherit them
_GIVEN = {name: os.environ[name] for name in CARDS if name in os.environ}
os.environ.update(dict.fromkeys(CARDS, "-1"))  # an empty value would be none at all on Windows

# A training run leaves ignored what its starter ignores: SIGINT in the background of a script, SIGHUP under nohup.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_configure(config: pytest.Config) -> None:
    """Gives the cards back to a run of the tests that are for one."""
    if re.fullmatch(r"gpu( and .*)?", config.option.markexpr.strip()):
        for name in CARDS:
            del os.environ[name]
        os.environ.update(_GIVEN)


if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads on two cores wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

LONGEST = ("test_faults.py", "test_demo.py", "test_probe.py", "test_process.py", "test_kill.py", "test_ranks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two processes none then waits at the end for the other one's."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """Of one of several processes (pytest-xdist) it is one, see above."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model; read it, do not write into it."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")

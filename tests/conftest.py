"""What every test shares: two threads, no network, no card unless `-m gpu` asks for it, and one tiny model."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Iterator
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

# Processes that tests start keep what they compile: without that each compiles all of this package anew, and whatever
# an installer left uncompiled, for some 10 seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# By what they took, see docs/log.md; the names hold in every folder. First, though short, the one that compares a
# prepared cache with one of the same files made later: tests of commands in between change what it remembers of them.
LONGEST = (
    "damage faults demo examples ranks generate_folder process probe generate style own_pictures opened_once export "
    "full_size kill train remake compiling index quantize shipped_recipes prepare benchmarks drawing_blocks "
    "hostile_adapters planned_models foreign_folders verbs training single_files int8_files hub"
)
FIRST = {f"test_{name}.py": place for place, name in enumerate(LONGEST.split())}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two processes none then waits at the end for the other one's."""
    items.sort(key=lambda item: FIRST.get(item.path.name, len(FIRST)))


def pytest_collection_finish() -> None:
    """What was imported stays: gc.collect(), which the package calls often, need not look through it every time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries complain at the end of what was never freed."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """Of one of several processes (pytest-xdist) it is one, see above."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def same_threads(two_threads: None) -> Iterator[None]:
    """A test that leaves torch with another number of threads makes all that come after it slow, so it fails."""
    import torch

    before = torch.get_num_threads()
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(before)
    assert left == before


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model; read it, do not write into it."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")

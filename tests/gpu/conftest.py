"""All tests here are for a card; without one they are skipped, or run on what LIBREFLUX_TEST_DEVICE names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu.alone import DEVICE, ON_CARD
from libreflux.emoji import compose


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("gpu")


@pytest.fixture(scope="session", autouse=True)
def card() -> None:
    """Skips all tests of a machine without a card."""
    if "LIBREFLUX_TEST_DEVICE" in os.environ:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch has no card here; LIBREFLUX_TEST_DEVICE=cpu runs most of these tests on the CPU")


@pytest.fixture(scope="session")
def needs_card(card: None) -> None:
    """For what only a card has: a cap on its memory, its peaks, its own errors."""
    if not ON_CARD:
        pytest.skip(f"there is no such thing on {DEVICE}")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures in a look that the emoji family does not know, so that there is something to learn."""
    return compose.write_folder(tmp_path_factory.mktemp("data") / "photos", 40, 1, pairs=0.0, look="pencil")


@pytest.fixture
def places(tiny_model_dir: Path, photos: Path, tmp_path: Path) -> dict[str, Path]:
    """What `recipes.tree` needs."""
    return {"tiny": tiny_model_dir, "photos": photos, "out": tmp_path / "run"}

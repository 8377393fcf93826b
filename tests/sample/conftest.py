"""A tiny pipeline for every test of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from libreflux.sample.pipeline import LibreFluxPipeline
from opened import Opened, opened


@pytest.fixture(scope="session")
def model(tiny_model_dir: Path) -> Opened:
    return opened(tiny_model_dir)


@pytest.fixture
def pipe(model: Opened) -> LibreFluxPipeline:
    made = model.pipeline()
    made.set_progress_bar_config(disable=True)
    return made

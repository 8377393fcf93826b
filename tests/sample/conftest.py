"""A tiny pipeline for every test of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from libreflux.model.family import Model, open_model
from libreflux.sample.pipeline import LibreFluxPipeline


@pytest.fixture(scope="session")
def model(tiny_model_dir: Path) -> Model:
    return open_model(tiny_model_dir)


@pytest.fixture
def pipe(model: Model) -> LibreFluxPipeline:
    made = LibreFluxPipeline.from_model(model)
    made.set_progress_bar_config(disable=True)
    return made

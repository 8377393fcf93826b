"""Probes that load no weights, and run folders as training leaves them: for tests of what was trained on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import libreflux
from libreflux.data import encode
from libreflux.data.prepare import prepare_cache
from libreflux.emoji import compose
from libreflux.probing import run as probe_run
from libreflux.probing.context import ProbeContext
from libreflux.probing.results import Measure
from libreflux.probing.section import Section, SectionResult
from libreflux.recipe import Recipe
from libreflux.training import run_recipe
from libreflux.workflows import probe_measure

NEW = 2
"""Pictures of `mixed` that nobody has trained on."""


@pytest.fixture
def no_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the model itself here: no weights are loaded, and each section finds one number."""

    def stub(section: Section) -> Section:
        def measure(context: ProbeContext) -> SectionResult:
            return SectionResult(
                [Measure(name="x", at={}, subset="all", value=1.0, low=0.0, high=2.0, replicates=[1.0])]
            )

        return dataclasses.replace(section, measure=measure)

    for module in (probe_measure, encode):
        monkeypatch.setattr(module, "release", lambda device: None)
    monkeypatch.setattr(probe_run, "SECTIONS", tuple(map(stub, probe_run.SECTIONS[:1])))

    def context(model: Any, data: Any, *rest: Any) -> Any:
        transformer = SimpleNamespace(device=torch.device("cpu"))
        return SimpleNamespace(transformer=transformer, settings=data.settings, has_drawn=lambda wanted: False)

    monkeypatch.setattr(probe_measure, "open_context", context)


@pytest.fixture(scope="module")
def mixed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the trained run's pictures one copied and one saved anew, and two that are new; read it only."""
    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    compose.write_folder(folder, NEW, 77)
    (folder / "metadata.jsonl").unlink()
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"something new {path.stem}")
    first, second = sorted(pictures.glob("*.png"))[:2]
    shutil.copy(first, folder / "copied.png")
    with Image.open(second) as picture:
        picture.save(folder / "saved.png", compress_level=0)
    for name in ("copied", "saved"):
        (folder / f"{name}.txt").write_text(f"{name} from the training")
    return folder


@pytest.fixture
def measure(no_sections: None, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """Probes the tiny model on a folder, by default into `tmp_path / "out"`."""

    def call(data: Path, **options: Any) -> Any:
        given = {"quick": True, "prompts": 2, "guidance": [1], "steps": [1, 2], "resolution": 32, **options}
        return libreflux.probe(str(tiny_model_dir), data=data, **{"out": tmp_path / "out", **given})

    return call


def seen_by_name(found: Any) -> dict[str, str | None]:
    """File names to how each was seen."""
    return {row.name: row.seen for row in found.result.trained.rows}


def claimed(run: Path, model: Path, photos: Path, **changed: Any) -> Recipe:
    """A run folder with its recipe and its cache, as training leaves them."""
    tree = {"model": str(model), "data": [{"path": str(photos)}], "resolution": [32], "steps": 1, "out": str(run)}
    recipe = Recipe.model_validate(tree | changed)
    run.mkdir()
    run_recipe.claim(run, recipe)
    prepare_cache(recipe)
    return recipe


def write_photos(folder: Path, count: int, first: int = 0) -> Path:
    """Captioned pictures of noise, each another one for each number."""
    folder.mkdir()
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"photo {number}")
    return folder

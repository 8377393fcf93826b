"""Folders of captioned pictures as tests write them, and what is read of them or said against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libreflux.data.sources import Sample, read_source
from libreflux.errors import DataError
from libreflux.recipe import DataSource


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    """A picture of noise, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def listed(folder: Path, *rows: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_folder(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


def read_folder(folder: Path, **options: Any) -> list[Sample]:
    samples, quarantined = read_source(DataSource(path=str(folder), **options))
    assert not quarantined
    return samples


def by_name(folder: Path) -> dict[str, Sample]:
    return {sample.path.name: sample for sample in read_folder(folder)}

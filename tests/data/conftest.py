"""One folder of captioned pictures, prepared once with the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caching import prepare
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.sources import Sample
from libreflux.recipe import DataSource

Prepared = tuple[Cache, list[tuple[DataSource, list[Sample]]]]
SQUARE = [View("square", 32)]


def write_pictures(folder: Path, count: int) -> Path:
    """Noise pictures of several sizes; captions of several lengths, one shared by all."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        shape = (40 + index, 48 - index, 3)
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        captions = {"short": f"a red apple {index}", "long": "a small green frog " * (1 + index), "same": "an apple"}
        rows.append(json.dumps({"file_name": f"{index:03d}.png", "captions": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven captioned pictures; read them only."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 7)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, pictures: Path) -> Prepared:
    """Those pictures prepared at 32 px, two crops each, in shards of four; read it only."""
    from libreflux.data import encode as module

    out = tmp_path_factory.mktemp("prepared") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD_ITEMS", 4)
        source = DataSource(path=str(pictures), crops_per_picture=2)
        return prepare(str(tiny_model_dir), [source], views=SQUARE, text_padding="drop", out=out)

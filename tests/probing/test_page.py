"""The page of a probe, read as a browser reads it."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libreflux import seeding
from libreflux.errors import DataError
from libreflux.probing.freedom import freedom
from libreflux.probing.metrics.bootstrap import mean, measured
from libreflux.probing.report.headlines import headlines
from libreflux.probing.report.html import STYLE
from libreflux.probing.report.page import model_labels, write_page
from libreflux.probing.report.plots import Series, lines
from libreflux.probing.results import Coordinate, Measure, Picture, Result, read_result, write_result

UNITS = 40
EVIL = '<script>alert("1 & 2")</script>'
VOID = {"meta", "img", "br"}
SETTINGS = {
    "seed": 0,
    "pictures": UNITS,
    "steps": [4, 28],
    "data": ["emoji", "abc"],
    "own_guidance": 1.0,
    "rungs": [0.5],
}


class Page(HTMLParser):
    """Refuses a tag that is not closed, or closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert len(dict(attributes)) == len(attributes)
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "img":
            self.images.append(dict(attributes)["src"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


def model(folder: Path, name: str, excess: float) -> Result:
    units = 0.1 * seeding.rng(0, "units").standard_normal(UNITS)
    units -= units.mean()
    rows: list[Measure] = []

    def add(name: str, level: float, at: dict[str, Any], reference: float | None = None) -> None:
        everyone = {"all": np.arange(UNITS)}
        rows.extend(measured(name, at, mean(level + units), UNITS, everyone, seed=0, reference=reference))

    for sigma in (0.25, 0.5, 0.75):
        add("loss", 0.5 + excess * sigma, {"sigma": sigma, "text": "caption"})
        add("slope", 1 - excess * sigma, {"sigma": sigma, "text": "caption"}, 1.0)
    for scale in (1.0, 2.0, 4.0, 6.0):
        add("clipped", excess * scale / 8, {"guidance": scale})
        add("accuracy", 1 - excess * scale / 8, {"guidance": scale, "what": "all"})
        add("distance", 10 * excess, {"guidance": scale, "kind": "FD"})
    add("accuracy", 0.9, {"steps": 4, "guidance": 1.0, "what": "all"})
    add("diversity", 0.3, {"guidance": 1.0, "kind": "features"})
    pictures = []
    for index, (purpose, scale, steps) in enumerate(
        [*(("guidance", scale, 28) for scale in (1.0, 2.0, 4.0, 6.0)), ("steps", 1.0, 4), ("steps", 1.0, 28)]
    ):
        file = f"pictures/{index}.png"
        pixels = seeding.rng(index, name).integers(256, size=(300, 300, 3), dtype=np.uint8)
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / file)
        at: dict[str, Coordinate] = {"prompt": EVIL, "guidance": scale, "steps": steps, "seed": 0}
        pictures.append(Picture(file=file, at=at, purpose=purpose))
    settings = {**SETTINGS, "rungs": SETTINGS["rungs"] if excess > 0.3 else []}
    told = {"name": name, "sha256": "ab" * 32, "adapters": [], "steps": 4}
    return Result(
        model=told,
        settings=settings,
        versions={"torch": "1"},
        seconds=2,
        measures=rows,
        pictures=pictures,
        folder=folder,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    root = tmp_path_factory.mktemp("results")
    return [
        model(root / name[:4], name, excess) for name, excess in (("dist & illed", 0.5), ("freed", 0.1), ("base", 0.0))
    ]


def test_the_page_is_whole_self_contained_and_tells_all(results: list[Result], tmp_path: Path) -> None:
    rows = freedom(results[1], results[0], results[2])
    path = write_page(results, tmp_path, freedom=rows)
    text = path.read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert EVIL in page.text
    assert "<script" not in text
    assert not re.search(r"https?:|url\(|@import|//\w", re.sub(r'src="data:[^"]*"', "", text))
    assert len(page.images) == 3 * 6
    assert page.tags.count("figure") == 4
    assert text.count("hollow") == 2 + STYLE.count("hollow")  # loss and slope of the few-step model, at its own rung
    for source in page.images:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))).verify()
    assert path.stat().st_size <= 3_000_000  # of noise, which no codec makes small
    for word in ("dist & illed", "freed", "base", "FD-emoji", "no gap", "80 % [80, 80]"):
        assert word in page.text
    assert "FID" not in page.text
    assert "dist & illed 25\u00a0%" in page.text
    assert "freed 5.0\u00a0%" in page.text  # clipped at guidance 4
    again = write_page(results, tmp_path / "again.html", freedom=rows)
    assert again.name == "again.html"
    assert again.read_bytes() == path.read_bytes()


def test_pictures_are_found_again_when_a_result_is_read(results: list[Result], tmp_path: Path) -> None:
    folder = results[0].folder
    assert folder is not None
    write_result(folder, results[0])
    alone = Page(write_page([read_result(folder)], tmp_path).read_text("utf-8"))
    assert "How free is dist & illed?" in alone.text
    assert len(alone.images) == 6
    missing = dataclasses.replace(results[0], folder=tmp_path)
    with pytest.raises(DataError, match=r"0\.png: no readable picture"):
        write_page([missing], tmp_path)


def test_a_poor_result_makes_a_poor_page(results: list[Result], tmp_path: Path) -> None:
    bare = Result(model={"name": "bare"}, settings={}, versions={}, seconds=0)
    assert "bare" in Page(write_page([bare], tmp_path / "bare.html").read_text("utf-8")).text
    holes = dataclasses.replace(results[0].measures[0], value=math.nan, low=math.nan, high=math.nan)
    full = dataclasses.replace(results[0], measures=[holes, *results[0].measures[1:]])
    text = write_page([full], tmp_path / "holes.html").read_text("utf-8")
    assert "not finite" in Page(text).text
    assert not re.search(r'(?:d|cx|cy|y)="[^"]*(?:nan|inf)', text)


def test_results_that_were_not_measured_alike_share_no_page(results: list[Result], tmp_path: Path) -> None:
    other = dataclasses.replace(results[1], settings={**results[1].settings, "seed": 1})
    with pytest.raises(DataError, match=r"another seed \(0 and 1\)"):
        write_page([results[0], other], tmp_path)
    with pytest.raises(ValueError):
        write_page([results[0]] * 6, tmp_path)


def test_labels_tell_models_apart() -> None:
    def one(adapters: list[dict[str, Any]]) -> Result:
        return Result(
            model={"name": "m", "sha256": "m" * 64, "adapters": adapters}, settings={}, versions={}, seconds=0
        )

    a, b = ({"name": "adapter.safetensors", "sha256": digit * 64, "weight": 1.0} for digit in "ab")
    half = {**a, "weight": 0.5}
    found = model_labels([one([]), one([a]), one([b]), one([half])])
    assert found == [
        "m",
        "m + adapter.safetensors (aaaaaa)",
        "m + adapter.safetensors (bbbbbb)",
        "m + adapter.safetensors × 0.5",
    ]


def test_sentences_keep_to_what_every_model_has(results: list[Result]) -> None:
    whole = headlines(results, ["a", "b", "c"])
    part = dataclasses.replace(results[2], measures=[row for row in results[2].measures if row.name != "accuracy"])
    assert len(whole) == 6
    assert len(headlines([*results[:2], part], ["a", "b", "c"])) == 4


@pytest.mark.parametrize("values", [(0.5, 0.5), (0.0, 0.0), (-1e-9, 1e9), (0.999, 1.001), (1e-12, 2e-12)])
def test_axes_take_in_every_value(values: tuple[float, float]) -> None:
    points = [(float(index), value, value, value) for index, value in enumerate(values)]
    drawn = lines([Series("a", 0, points)], title="t", x="x", y="y")
    centres = [(float(x), float(y)) for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)]
    assert len(centres) == 2
    assert all(0 <= x <= 460 and 0 <= y <= 300 for x, y in centres)
    assert (centres[0][1] > centres[1][1]) == (values[0] < values[1])
    assert lines([Series("a", 0, [])], title="t", x="x", y="y") == ""

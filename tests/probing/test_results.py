"""The file of a result, and the intervals in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from libreflux import seeding
from libreflux.errors import DataError
from libreflux.probing.metrics.bootstrap import REPLICATES, mean, measured, ratio, root_ratio
from libreflux.probing.results import Measure, Picture, Result, read_result, write_result
from libreflux.probing.run import read_section, section_file, write_section
from libreflux.probing.section import SectionResult
from libreflux.probing.subjects import find_name, groups, parse_prompt

EVERYONE = {"all": np.arange(40)}
VALUES = seeding.rng(0, "values").standard_normal(40)


def test_a_result_is_read_back_as_it_was_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    broken = Measure(
        name="slope",
        at={"sigma": 0.5, "text": "empty"},
        subset="all",
        value=math.nan,
        low=math.inf,
        high=1.0,
        replicates=[0.5, math.nan],
        reference=1.0,
    )
    picture = Picture(file="pictures/a.png", at={"prompt": "a fox", "seed": 3}, purpose="seeds")
    result = Result(
        model={"name": "m"}, settings={"seed": 0}, versions={}, seconds=1.5, measures=[broken], pictures=[picture]
    )
    path = write_result(tmp_path, result)
    row = json.loads(path.read_text())["measures"][0]
    assert (row["value"], row["low"], row["high"], row["replicates"]) == (None, None, 1.0, [0.5, None])
    again = read_result(tmp_path)
    assert again.as_json() == result.as_json()
    assert again.pictures == [picture]
    assert math.isnan(again.measures[0].value)
    assert again.find("slope", sigma=0.5, text="empty") is again.measures[0]
    assert again.find("slope") is None
    for text in ("{}", "[1]", '{"schema": 2}', "no json"):
        path.write_text(text)
        with pytest.raises(DataError, match="hint"):
            read_result(tmp_path)


def test_replicates_of_two_models_are_paired_and_depend_on_the_count_alone() -> None:
    [one] = measured("a", {}, mean(VALUES), 40, EVERYONE, seed=0)
    [two] = measured("b", {}, mean(VALUES + 1), 40, EVERYONE, seed=0)
    assert len(one.replicates) == REPLICATES
    np.testing.assert_allclose(np.array(two.replicates) - one.replicates, 1, rtol=1e-12)
    assert np.std(one.replicates) == pytest.approx(VALUES.std() / 40**0.5, rel=0.2)
    assert one.low < one.value < one.high
    part = {"seen": np.arange(30, 40), "unseen": np.array([3])}
    [seen] = measured("a", {}, mean(VALUES), 40, part, seed=0)  # one unit has no interval
    [alone] = measured("a", {}, mean(VALUES[30:]), 10, {"seen": np.arange(10)}, seed=0)
    assert seen.value == pytest.approx(VALUES[30:].mean())
    assert seen.replicates == pytest.approx(alone.replicates)


def test_a_section_is_kept_until_anything_of_it_is_another(tmp_path: Path) -> None:
    [row] = measured("a", {"sigma": 0.5}, mean(VALUES), 40, EVERYONE, seed=0)
    picture = Picture(file="pictures/a.png", at={}, purpose="steps")
    (tmp_path / "pictures").mkdir()
    (tmp_path / picture.file).write_bytes(b"")
    write_section(tmp_path, "steps", "key", SectionResult([row], [picture]), 2.5)
    assert read_section(tmp_path, "steps", "key") == (SectionResult([row], [picture]), 2.5)
    assert read_section(tmp_path, "steps", "other key") is None
    assert read_section(tmp_path, "guidance", "key") is None
    text = section_file(tmp_path, "steps").read_text()
    section_file(tmp_path, "steps").write_text(text[: len(text) // 2])
    assert read_section(tmp_path, "steps", "key") is None
    section_file(tmp_path, "steps").write_text(text)
    (tmp_path / picture.file).unlink()
    assert read_section(tmp_path, "steps", "key") is None


def test_statistics() -> None:
    weights = np.full((1, 4), 0.25)
    assert mean(np.array([1, math.nan, 3, math.nan]))(weights) == 2
    assert np.isnan(mean(np.full(4, math.nan))(weights)).all()
    assert ratio(np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 1, 2]))(weights) == 2
    assert root_ratio(np.array([9.0] * 4), np.array([4.0] * 4))(weights) == 1.5
    biased = seeding.rng(0, "biased").random(REPLICATES + 1)
    [centred] = measured("a", {}, lambda w: biased, 40, EVERYONE, seed=0, centred=True)
    assert np.mean(centred.replicates) == pytest.approx(centred.value)


def test_what_a_prompt_names() -> None:
    names = ("dog", "hot dog", "orange", "fox")
    places = ("left", "top left", "right")
    grounds = ("on red", "on a red to white gradient")
    asked = {"subject": names, "colour": ("orange", "red"), "place": places, "ground": grounds}
    one = parse_prompt("a small hot dog at the left, on orange", asked)
    assert (one.subject, one.colour) == ("hot dog", "orange")
    assert parse_prompt("an orange on red", asked).subject == "orange"
    assert parse_prompt("a foxglove on blue", asked).subject is None
    assert find_name("a FOX left of a dog", names) == "dog" or find_name("a fox by a fox", names) == "fox"
    assert one.named == {"subject": "hot dog", "colour": "orange", "place": "left"}
    told = parse_prompt("a fox at the top left, on a red to white gradient", asked).named
    assert told == {"subject": "fox", "place": "top left", "ground": "on a red to white gradient"}
    assert parse_prompt("a fox on red", asked).named == {"subject": "fox", "colour": "red", "ground": "on red"}
    parts = groups(["dog", None, "fox", "dog"], {"dog"})
    assert {name: rows.tolist() for name, rows in parts.items()} == {
        "all": [0, 1, 2, 3],
        "seen": [0, 3],
        "unseen": [2],
    }
    assert list(groups(["dog"], None)) == ["all"]

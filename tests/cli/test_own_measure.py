"""A measure of the user's own: the documented one, named by its file, by an entry point, and in a call."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import libreflux
from libreflux.errors import DataError, OptionError
from libreflux.probing import run as probe_run
from libreflux.probing.own import OfPictures, OwnMeasure
from libreflux.probing.results import read_result
from libreflux.probing.sections import velocity_metrics
from libreflux.workflows.probe_own import GROUP, own_measures
from workflows.quick import measure_less

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--quick", "--pictures", 3, "--prompts", 3, "--guidance", "1,4", "--steps", "1,2"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_less(monkeypatch)
    monkeypatch.setattr(probe_run, "SECTIONS", (velocity_metrics.SECTION,))


@pytest.fixture
def documented(tmp_path: Path) -> Path:
    """The file that the page tells to write."""
    [text] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-measure.md").read_text("utf-8"), re.DOTALL)
    file = tmp_path / "edges.py"
    file.write_text(text, "utf-8")
    return file


def test_the_documented_example_is_in_table_json_csv_and_page(
    run: Callable[..., Any], tiny_model_dir: Path, plain: Path, documented: Path, tmp_path: Path
) -> None:
    out, sheet = tmp_path / "out", tmp_path / "units.csv"
    command = ["probe", tiny_model_dir, "--data", plain, "--out", out, *SMALL]
    others = ["--against", tiny_model_dir, "--reference", tiny_model_dir, "--csv", sheet]
    done = run(*command, "--measure", f"{documented}:edges", *others)
    assert done.code == 0, done.err
    assert re.search(r"sharpness, guidance 4 .*no gap", done.out)
    result = read_result(out)
    places = [dict(one.at) for one in result.measures if one.name == "sharpness"]
    assert places[:2] == [{"guidance": 1.0}, {"guidance": 4.0}]
    assert [place["steps"] for place in places[2:]] == [1, 2]
    one, real = result.find("sharpness", guidance=4.0), result.find("held_out_sharpness")
    assert one is not None
    assert real is not None
    assert (len(one.replicates), one.count, one.unit) == (200, 3, "of 255")
    assert one.low < one.value < one.high
    assert real.value > 1
    rows = json.loads((out / "freedom.json").read_text("utf-8"))["freedom"]
    assert {row["name"] for row in rows if "sharpness" in row["name"]} == {"sharpness"}
    with sheet.open(encoding="utf-8", newline="") as file:
        own = [row for row in csv.DictReader(file) if (row["measure"], row["at"]) == ("sharpness", "guidance 4")]
    assert [row["number"] for row in own] == ["0", "1", "2"] * 3
    assert np.mean([float(row["value"]) for row in own[:3]]) == pytest.approx(one.value)
    assert "How sharp pictures are." in (out / "index.html").read_text("utf-8")

    # Measured anew with another file, and the probe's own sections stay.
    kept = out / "sections" / "own-sharpness.json"
    before = {path: path.stat().st_mtime_ns for path in (kept, out / "sections" / "pictures.json")}
    documented.write_text(documented.read_text("utf-8") + "# changed\n", "utf-8")
    assert run(*command, "--measure", f"{documented}:edges").code == 0
    assert [path.stat().st_mtime_ns == time for path, time in before.items()] == [False, True]


def test_an_installed_package_registers_it(documented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "edges-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: edges\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(f"[{GROUP}]\nsharpness = edges:edges\n")
    monkeypatch.syspath_prepend(tmp_path)
    [found] = own_measures("sharpness")
    assert found.name == "sharpness"
    assert found.digest == own_measures(f"{documented}:edges")[0].digest
    with pytest.raises(OptionError, match=r"there is no 'other'; installed: sharpness"):
        own_measures(["other"])
    with pytest.raises(OptionError, match="two of them are called 'sharpness'"):
        own_measures([found, "sharpness"])


def test_a_call_takes_the_object_and_shares_have_wilsons_interval(
    tiny_model_dir: Path, plain: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "quick": True,
        "pictures": 3,
        "prompts": 3,
        "guidance": [1],
        "steps": [1],
        "out": tmp_path / "out",
    }
    grey = OwnMeasure(name="grey", of=lambda pictures, prompts: [1, 1, float("nan")], is_share=True)
    found = libreflux.probe(str(tiny_model_dir), data=plain, measures=grey, **asked)
    one = found.result.find("grey", guidance=1.0)
    assert one is not None
    assert (one.value, one.count) == (1, 2)
    assert one.low == pytest.approx(0.342, abs=1e-3)
    wrong: list[tuple[Any, str]] = [
        (lambda pictures, prompts: 1 / 0, r"grey: its function failed \(ZeroDivisionError: division by zero\)"),
        (lambda pictures, prompts: [float("inf")] * 3, "grey: its function gave an infinite number"),
        (lambda pictures, prompts: [0.5] * 3, "grey: is a share, and a number is neither 0 nor 1"),
    ]
    for number, (of, text) in enumerate(wrong, 2):
        own = OwnMeasure(name="grey", of=of, is_share=True, version=number)
        with pytest.raises(DataError, match=f"^{text}"):
            libreflux.probe(str(tiny_model_dir), data=plain, measures=[own], **asked)


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        ("nowhere", "--measure: there is no 'nowhere'"),
        ("nowhere.py:edges", "--measure: no such file: nowhere.py"),
        ("{file}:other", "edges.py has no 'other'"),
        ("{file}:sharpness", "is no libreflux.probing.own.OwnMeasure but a function"),
        ("{leaving}:edges", "cannot be read (SystemExit: 3)"),
        ("{broken}:edges", "cannot be read (SyntaxError: "),
        ("{taken}:edges", "loss: is a measure of every probe; hint: give yours another name"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_read(
    run: Callable[..., Any], documented: Path, tmp_path: Path, measure: str, text: str
) -> None:
    broken, taken, leaving = (tmp_path / name for name in ("broken.py", "taken.py", "leaving.py"))
    leaving.write_text("raise SystemExit(3)\n")
    broken.write_text("edges = =\n")
    taken.write_text(documented.read_text("utf-8").replace('name="sharpness"', 'name="loss"'))
    files = {"broken": broken, "taken": taken, "leaving": leaving}
    refused = run("probe", "no-model", "--measure", measure.format(file=documented, **files))
    assert refused.code == 2
    assert text in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_what_a_function_holds_is_in_its_key() -> None:
    def of(pictures: np.ndarray, prompts: Sequence[str], power: float = 1) -> np.ndarray:
        return np.mean(pictures**power, axis=(1, 2, 3))

    def above(limit: float) -> OfPictures:
        return lambda pictures, prompts: pictures.max(axis=(1, 2, 3)) > limit

    def unfinished() -> str:
        def of(pictures: np.ndarray, prompts: Sequence[str]) -> list[float]:
            return [later] * len(prompts)

        found = OwnMeasure(name="grey", of=of).digest
        later = 1.0
        return found

    def typed(text: str) -> OfPictures:
        return eval(text)  # as at a prompt: it has no file

    class Blurred:
        def __init__(self, radius: int) -> None:
            self.radius = radius

        def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> list[float]:
            return [self.radius] * len(prompts)

    pairs: list[tuple[OfPictures, OfPictures, OfPictures]] = [
        (functools.partial(of, power=2), functools.partial(of, power=2), functools.partial(of, power=3)),
        (above(1), above(1), above(2)),
        (typed("lambda a, b: [1]"), typed("lambda a, b: [1]"), typed("lambda a, b: [2]")),
        (Blurred(1), Blurred(1), Blurred(2)),
        (Blurred(1).__call__, Blurred(1).__call__, Blurred(2).__call__),
        (np.add, np.add, np.multiply),
    ]
    assert len(unfinished()) == 64
    for one, same, other in pairs:
        digests = [OwnMeasure(name="grey", of=each).digest for each in (one, same, other)]
        assert digests[0] == digests[1]
        assert digests[0] != digests[2]


def test_a_file_may_hold_a_dataclass(documented: Path) -> None:
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    head += "@dataclass\nclass A:\n    b: int = 1\n"
    documented.write_text(head + documented.read_text("utf-8"), "utf-8")
    assert own_measures(f"{documented}:edges")[0].name == "sharpness"

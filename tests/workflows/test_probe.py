"""A probe from Python: the numbers, the freedom and the page that the command writes, and nothing printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import libreflux
from libreflux.errors import OptionError, RecipeError
from workflows.quick import measure_less


def told(file: Path) -> Any:
    """What a file says, but for how long it took."""
    return json.loads(file.read_text("utf-8")) | {"seconds": None}


def test_what_python_measures_is_what_the_command_measures(
    run: Callable[..., Any],
    tiny_model_dir: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    measure_less(monkeypatch)
    ours, theirs, model = tmp_path / "python", tmp_path / "command", str(tiny_model_dir)
    found = libreflux.probe(
        model,
        against=model,
        data=str(pictures),
        out=str(ours),
        quick=True,
        pictures=2,
        prompts=2,
        guidance=[1],
        steps=[1, 2],
    )
    assert capfd.readouterr().out == ""
    words = ["--pictures", 2, "--prompts", 2, "--guidance", "1", "--steps", "1,2"]
    done = run("probe", model, "--against", model, "--data", pictures, "--out", theirs, "--quick", *words, "--json")
    assert done.code == 0, done.err
    for name in ("probe.json", "against/probe.json"):
        assert told(ours / name) == told(theirs / name)
    assert (ours / "freedom.json").read_bytes() == (theirs / "freedom.json").read_bytes()
    assert json.loads(done.out) == json.loads((ours / "freedom.json").read_text("utf-8"))

    assert found.folder == ours
    assert found.page == ours / "index.html"
    assert found.page.is_file()
    assert found.file == ours / "freedom.json"
    assert found.freedom is not None
    assert len(found.freedom) > 5
    assert [one.folder for one in found.in_order] == [ours / "against", ours]
    alone = libreflux.probe(
        model, data=pictures, out=ours, quick=True, pictures=2, prompts=2, guidance=[1], steps=[1, 2]
    )
    assert alone.freedom is None
    assert alone.file == ours / "probe.json"
    assert alone.in_order == [found.result]


def test_a_result_whose_accuracy_was_counted_otherwise_is_told(
    tiny_model_dir: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measure_less(monkeypatch)
    numbers: dict[str, Any] = {"quick": True, "pictures": 2, "prompts": 2, "guidance": [1], "steps": [1]}
    former = libreflux.probe(str(tiny_model_dir), data=str(pictures), out=str(tmp_path / "former"), **numbers)
    tree = json.loads(former.file.read_text("utf-8"))
    tree["measures"].append(tree["measures"][0] | {"name": "accuracy", "at": {"guidance": 4.0, "what": "both"}})
    former.file.write_text(json.dumps(tree), "utf-8")
    libreflux.probe(
        str(tiny_model_dir), against=str(former.folder), data=str(pictures), out=str(tmp_path / "now"), **numbers
    )
    assert "former is of an older libreflux: probe it again" in caplog.text


@pytest.mark.parametrize(
    ("options", "words", "text"),
    [
        ({"reference": "m"}, ["--reference", "m"], "reference: needs `against`; hint: name the distilled model with "),
        ({"features": "f", "judge": "j"}, ["--features", "f", "--judge", "j"], "features: takes the place of `judge`"),
        (
            {"controls": False},
            ["--no-controls"],
            "controls: are drawn with `against` alone; hint: leave it out, or name",
        ),
        ({"dtype": "fp8"}, ["--dtype", "fp8"], "dtype: 'fp8' is no precision; hint: use stored, fp32 or bf16"),
        ({"resolution": 40}, ["--resolution", 40], "resolution: 40 is not a multiple of 16; hint: use 32"),
    ],
)
def test_what_is_refused_is_named_as_the_caller_wrote_it(
    run: Callable[..., Any], options: dict[str, Any], words: list[Any], text: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        libreflux.probe("nowhere", **options)
    assert str(refused.value).startswith(text)
    typed = text.replace("`against`", "--against").replace("`judge`", "--judge")
    assert run("probe", "nowhere", *words).err.startswith(f"libreflux: error: --{typed}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pictures": 1}, "^pictures: cannot be 1; hint: use 2 or more$"),
        ({"resolution": 8208}, "^resolution: cannot be 8208; hint: use a whole number from 16 to 8192$"),
        ({"seed": -1}, "^seed: cannot be -1"),
        ({"guidance": [3, 3]}, "^guidance: '3,3' has 3 twice"),
        ({"guidance": [float("nan")]}, "^guidance: cannot be nan"),
        ({"steps": [4, 2.5]}, "^steps: cannot be 2.5"),
        ({"steps": []}, "^steps: '' is no list of numbers"),
    ],
)
def test_numbers_that_a_command_line_refuses_are_refused_in_a_call(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        libreflux.probe("nowhere", **options)


def test_a_model_of_another_family_needs_pictures(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"^data: is not of the emoji family"):
        libreflux.probe(str(tiny_model_dir), out=tmp_path / "a")
    assert "error: --data: is not of the emoji family" in run("probe", tiny_model_dir, "--out", tmp_path / "b").err

"""The examples of docs/python.md, run in their order in one folder, and those of the docstrings, beside that run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import libreflux
from libreflux.cli.app import app
from workflows.quick import measure_less

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
RUN_ELSEWHERE = {"caption", "generate", "generate_folder", "remake", "grid", "demo", "sweep", "probe_few_steps"}
"""By test_generate.py, test_generate_folder.py, test_sweep.py, test_few_steps.py and
tests/captioning/test_vision_model.py; and tests/cli/test_demo.py runs the demo, which takes minutes."""


@dataclass(frozen=True)
class Ran:
    """Where the page's examples ran, and what they printed."""

    folder: Path
    out: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("page")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(folder)
        measure_less(patch)
        for language, code in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
            if language == "sh":
                with redirect_stdout(StringIO()):
                    app(shlex.split(code)[1:], standalone_mode=False)
            else:
                exec(compile(code, str(PAGE), "exec"), names)
        yield Ran(folder, printed.getvalue())


def test_the_page_runs_as_it_stands(ran: Ran) -> None:
    assert ran.out.count("\n") == len(re.findall(r"^print\(", PAGE.read_text("utf-8"), re.MULTILINE))
    assert ran.out.startswith("runs/mine/adapter.safetensors\n")
    assert (ran.folder / "fox.png").is_file()
    assert (ran.folder / "my-model-int8" / "libreflux.json").is_file()
    assert list((ran.folder / "runs" / "mine" / "samples").glob("*.png"))
    assert (ran.folder / "runs" / "mine" / "held_out.jsonl").is_file()


def example_of(name: str) -> str:
    """The example in a function's docstring, as it is indented there."""
    return (getattr(libreflux, name).__doc__ or "").partition("Example::\n\n")[2].partition("\n\nArgs:")[0]


FUNCTIONS = [name for name in libreflux.__all__ if name[0].islower() and name != "open_model"]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in RUN_ELSEWHERE])
def test_the_example_of_a_docstring_runs(
    name: str, ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ran.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    measure_less(monkeypatch)
    code = example_of(name)
    exec("if True:\n" + code, {})
    out = capsys.readouterr().out
    assert ("print(" in code) == bool(out.strip())
    for shown in re.findall(r"# (\S+)$", code, re.MULTILINE):
        assert shown in out


def test_every_function_has_an_example() -> None:
    assert {"train", "generate", "merge", "average", "probe", "export", "load_adapter"} <= set(FUNCTIONS)
    for name in FUNCTIONS:
        assert f"libreflux.{name}(" in example_of(name)

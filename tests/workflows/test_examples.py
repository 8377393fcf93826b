"""The examples of docs/python.md, run in their order in one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from libreflux.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text("utf-8")
    names: dict[str, Any] = {}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        if language == "sh":
            app(shlex.split(code)[1:], standalone_mode=False)
            capsys.readouterr()
        else:
            exec(compile(code, str(PAGE), "exec"), names)
    told = capsys.readouterr()
    assert told.out.count("\n") == len(re.findall(r"^print\(", text, re.MULTILINE))
    assert told.out.startswith("runs/mine/adapter.safetensors\n")
    assert (tmp_path / "fox.png").is_file()
    assert (tmp_path / "my-model-int8" / "libreflux.json").is_file()
    assert list((tmp_path / "runs" / "mine" / "samples").glob("*.png"))
    assert (tmp_path / "runs" / "mine" / "held_out.jsonl").is_file()

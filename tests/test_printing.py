"""Text of others on a terminal and in a log: nothing is obeyed, nothing fails; and no line goes another way."""

from __future__ import annotations

import ast
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import libreflux
from libreflux.cli.progress import progress
from libreflux.cli.terminal import SafeConsole
from libreflux.errors import LibrefluxError, RunError
from libreflux.printing import get_logger, printable, quoted_command, quoted_path, say, say_json, say_table

ROOT = Path(libreflux.__file__).parent
HOSTILE = "a\x1b]0;title\x07\x1b[2J b\u202egpj.exe\ud83d\x9b\n\u2028c"
SHOWN = "a\\x1b]0;title\\x07\\x1b[2J b\\u202egpj.exe\\ud83d\\x9b\\x0a\\u2028c"


def test_what_a_terminal_obeys_is_shown_and_the_rest_is_as_it_was() -> None:
    assert printable(HOSTILE) == SHOWN
    harmless = "ünïcödé, 狐, 👩‍🚀 \\ é"
    assert printable(harmless) == harmless
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_every_way_to_a_terminal_shows_it(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    say(HOSTILE, HOSTILE)
    say(HOSTILE, err=True)
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"{SHOWN}\n{SHOWN}\n", f"{SHOWN}\n")
    say_table("a\x1b\nb")
    assert capsys.readouterr().out == "a\\x1b\nb\n"
    say_json('{\n"a": "\x7f\u2028ü"}\n')
    assert capsys.readouterr().out == '{\n"a": "\\u007f\\u2028ü"}\n'
    assert str(LibrefluxError(HOSTILE.replace("\n\u2028", ""), where="x")) == "x: " + SHOWN.replace("\\x0a\\u2028", "")
    get_logger("libreflux.test").warning("%s and %d", HOSTILE, 3)
    assert caplog.records[0].getMessage() == f"{SHOWN} and 3"
    assert len(get_logger("libreflux.test").filters) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_it_too(terminal: bool) -> None:
    file = io.StringIO()
    with progress("drawing", "step", SafeConsole(file=file, force_terminal=terminal, width=200)) as report:
        report(1, 1, "note \x1b]0;x\x07 \x9b")
    assert "note \\x1b]0;x" in file.getvalue()
    assert "\\x9b" in file.getvalue()
    assert "\x1b]0" not in file.getvalue()
    assert ("\x1b[" in file.getvalue()) == terminal


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_any_encoding_fails_at_nothing(encoding: str) -> None:
    code = "from libreflux.printing import never_fail, say\nnever_fail()\nsay('é狐👩', '\\ud83d')"
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    first = "\\xe9" if encoding == "ascii" else "é"
    assert done.stdout.decode(encoding).splitlines() == [f"{first}\\u72d0\\U0001f469", "\\ud83d"]


WAYS = {
    "print": {"printing.py"},
    "typer.echo": set(),
    "click.echo": set(),
    "sys.stdout.write": set(),
    "sys.stderr.write": set(),
    "logging.getLogger": {"printing.py"},
    "Console": set(),
    "json.loads": {
        "plainjson.py",
        "files.py",
        "model/save.py",
        "probing/settings.py",
        "training/ranks.py",
        "emoji/compose.py",
        "emoji/artists/subjects.py",
    },  # the others read what this process, or this package, wrote
}
"""Calls that only these files may make: all text goes through `printing`, all JSON of others through `plainjson`."""


def calls(source: str) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("way", WAYS)
def test_no_line_goes_another_way(way: str) -> None:
    files = [path for path in ROOT.rglob("*.py") if "build" not in path.parts]
    found = {path.relative_to(ROOT).as_posix() for path in files if way in calls(path.read_text(encoding="utf-8"))}
    assert len(files) > 100
    assert found == WAYS[way]


def test_only_the_command_prints() -> None:
    """Whatever a workflow has to tell is in its result, in a callback or in a warning."""
    files = [path for path in ROOT.rglob("*.py") if not {"build", "cli"} & set(path.relative_to(ROOT).parts)]
    names = re.compile(r"\b(say|say_table|say_json|never_fail)\b")
    assert names.search(names_of("from libreflux.printing import counted, say as tell"))
    assert names.search(names_of("import libreflux.printing\nlibreflux.printing.say_json('1')"))
    found = {file.relative_to(ROOT).as_posix() for file in files if names.search(names_of(file.read_text("utf-8")))}
    assert len(files) > 100
    assert found == {"printing.py"}


def names_of(source: str) -> str:
    """Every name that a module imports, reads or calls, in a line."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    attributes = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    return " ".join([*imported, *attributes, *(node.id for node in nodes if isinstance(node, ast.Name))])


TYPED = {
    "model/device.py",  # of torchrun and docker
    "probing/report/html.py",  # names of CSS
    "workflows/caption_page.py",  # names of CSS
    "workflows/demo.py",  # commands to do the demo by hand
    "workflows/dry_run.py",  # the report of `train --dry-run`
    "workflows/model_card.py",  # a command in a model's README
    "workflows/next_steps.py",  # commands to go on with
}
"""Files outside cli/ whose texts may have options of a command line; others name a call's, see `OptionHint`."""


def texts(source: str) -> list[str]:
    """The string literals of a module, and the pieces of its f-strings, without docstrings."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told]
    return [node.value for node in found if isinstance(node.value, str)]


def test_a_python_caller_is_told_of_no_option_of_a_command() -> None:
    assert texts('"""x --a"""\ny = f"{1} --b"\n"""z --c"""') == [" --b"]
    files = [path for path in ROOT.rglob("*.py") if not {"build", "cli"} & set(path.relative_to(ROOT).parts)]
    found = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(re.search(r"(^|[\s`(])--[a-z]", text) for text in texts(path.read_text(encoding="utf-8")))
    }
    assert len(files) > 100
    assert found == TYPED


def test_every_logger_of_ours_has_the_filter() -> None:
    import libreflux.cli.app
    import libreflux.training.loop

    assert libreflux.cli.app
    assert libreflux.training.loop
    ours = [name for name in logging.root.manager.loggerDict if name.startswith("libreflux.")]
    loggers = [one for name in ours if isinstance(one := logging.root.manager.loggerDict[name], logging.Logger)]
    assert len(loggers) > 8
    assert all(logger.filters for logger in loggers if logger.name != "libreflux.test")


def test_a_name_of_thousands_of_characters_is_shown_by_its_ends() -> None:
    told = str(RunError("is not there", where="a" + "x" * 5000 + "b", hint="look"))
    assert len(told) < 700
    assert told.startswith("axx")
    assert told.endswith("xxb: is not there; hint: look")


WORDS = ["merge", "my run", 'a "b"', "it's", "C:\\x y\\"]


def test_a_command_is_quoted_for_the_systems_own_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quoted_command(WORDS, windows=True) == r'''merge "my run" "a \"b\"" it's "C:\x y\\"'''
    assert quoted_command(["a&b", "a b&c", "plain"], windows=True) == '"a&b" "a b&c" plain'
    assert shlex.split(quoted_command(WORDS, windows=False)) == WORDS
    assert quoted_command([Path("a b"), 3]) == ('"a b" 3' if os.name == "nt" else "'a b' 3")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert quoted_path("~/my run", windows=False) == "~/'my run'"
    assert quoted_path("~/my run", windows=True) == '"/home/me/my run"'
    assert [quoted_path(path, windows=False) for path in ("~/", "my run", "~me")] == ["'~/'", "'my run'", "'~me'"]

"""A user's mistake: one line with the hint on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from libreflux import files
from libreflux.errors import ModelError, RecipeError, RunError
from libreflux.model.locate import locate
from libreflux.workflows import generate
from libreflux.workflows import train as workflow
from libreflux.workflows.model_options import chosen_model
from rights import bound_by_modes


def refused(result: Any, *parts: str) -> None:
    lines = result.err.strip().splitlines()
    assert result.code == 2
    assert len(lines) == 1, result.err
    assert lines[0].startswith("libreflux: error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder that must be as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before


GONE = [["generate", "x"], ["grid", "x"], ["prepare", "x", "--out", "y"]]


@pytest.mark.skipif(sys.platform == "win32", reason="it removes no folder that is in use")
@pytest.mark.parametrize("verb", GONE, ids=lambda verb: verb[0])
def test_a_current_folder_that_is_gone_is_one_line(run: Callable, place: Path, verb: list[str]) -> None:
    gone = place / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    done = run(*verb)
    os.chdir(place)
    refused(done, "the current folder has been removed; hint: change to one that is there")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["generate"], ["nothing to draw", "libreflux generate --help"]),
        (["genrate", "x"], ["No such command", "genrate"]),
        (["generate", "x", "--stepz", "3"], ["--stepz"]),
        (["generate", "x", "--steps", "0"], ["--steps"]),
        (["generate", "x", "--model", "no/such/model/here"], ["no such model", "hint"]),
        (["generate", "x", "--model", "emoji-bas"], ["did you mean emoji-base?"]),
        (["generate", "x", "--model", "MODEL", "--adapter", "no.safetensors"], ["no such adapter file", "hint"]),
        (["generate", "x", "--model", "MODEL", "--adapter", "a.safetensors:much"], ["'much' is no weight"]),
        (["generate", "x", "--model", "MODEL", "--adapter", "file.txt"], ["file.txt", "safetensors"]),
        (["generate", "x", "--width", "100"], ["--width", "use 96"]),
        (["generate", "x", "--height", "0"], ["--height"]),
        (["generate", "x", "--height", "-16"], ["--height"]),
        (["generate", "x", "--guidance", "1", "--negative", "y"], ["--negative", "no effect at guidance 1", "hint"]),
        (["generate", "x", "--guidance", "1", "--no-cfg-until", "2"], ["--no-cfg-until", "no effect", "hint"]),
        (["generate", "x", "--steps", "-4"], ["--steps"]),
        (["generate", "x", "--sigmas", "1,nan"], ["--sigmas", "nan", "cannot be nan"]),
        (["generate", "x", "--sigmas", "0.5,0.75"], ["--sigmas", "falling numbers", "hint"]),
        (["generate", "x", "--sigmas", "0.5,0.5"], ["--sigmas", "falling numbers", "hint"]),
        (["generate", "x", "--sigmas", "1.5,0.5"], ["--sigmas", "falling numbers", "hint"]),
        (["generate", "x", "--sigmas", "1,0"], ["--sigmas", "the last one, 0, is added"]),
        (["generate", "x", "--sigmas", "1,half"], ["--sigmas", "'1,half' is no list of numbers", "hint"]),
        (["generate", "x", "--sigmas", ""], ["--sigmas", "is empty", "hint"]),
        (["generate", "x", "--sigmas", "1,0.5", "--steps", "2"], ["--steps", "no effect beside --sigmas", "hint"]),
        (["generate", "x", "--sigmas", "1,0.5", "--no-cfg-until", "2"], ["--no-cfg-until", "no step of 2"]),
        (["generate", "x", "--embedded-guidance", "inf"], ["--embedded-guidance", "cannot be inf", "hint"]),
        (
            ["generate", "x", "--model", "MODEL", "--embedded-guidance", "3"],
            ["--embedded-guidance", "no effect", "hint"],
        ),
        (["generate", "x", "--max-tokens", "0"], ["--max-tokens"]),
        (["generate", "x", "--model", "MODEL", "--max-tokens", "513"], ["--max-tokens: cannot be 513", "1 to 512"]),
        (["generate", "x", "y", "--prompt-2", "z"], ["--prompt-2: 1 for 2 prompts", "hint"]),
        (["generate", "x", "--guidance", "1", "--negative-2", "y"], ["--negative-2", "no effect at guidance 1"]),
        (["generate", "--remake", "file.txt", "--prompt-2", "z"], ["--prompt-2", "no effect beside --remake"]),
        (["generate", "x", "--guidance", "nan"], ["--guidance"]),
        (["generate", "x", "--guidance", "inf"], ["--guidance", "cannot be inf", "hint"]),
        (["generate", "x", "--guidance-start", "1.5"], ["--guidance-start", "fraction of the steps", "hint"]),
        (["generate", "x", "--guidance-stop", "nan"], ["--guidance-stop", "cannot be nan", "hint"]),
        (
            ["generate", "x", "--guidance-start", ".5", "--guidance-stop", ".5"],
            ["--guidance-start", "not below the stop"],
        ),
        (["generate", "x", "--guidance-start", ".6", "--guidance-stop", ".7", "--steps", "4"], ["no step of 4"]),
        (["generate", "x", "--guidance-start", ".5", "--no-cfg-until", "1"], ["--no-cfg-until", "--guidance-start"]),
        (["generate", "x", "--guidance", "0", "--guidance-rescale", "0.5"], ["--guidance-rescale", "no effect"]),
        (["generate", "x", "--guidance-rescale", "2"], ["--guidance-rescale", "cannot be 2", "hint"]),
        (["generate", "x", "--guidance", "1", "--batch-cfg", "on"], ["--batch-cfg", "no effect at guidance 1"]),
        (["generate", "x", "--batch-cfg", "maybe"], ["--batch-cfg", "maybe"]),
        (["generate", "x", "--model", "MODEL", "--offload", "model"], ["--offload", "of no use on cpu", "hint"]),
        (["grid", "x", "--model", "MODEL", "--offload", "sequential"], ["--offload", "of no use on cpu", "hint"]),
        (["generate", "x", "--quantize", "int8", "--offload", "sequential"], ["--offload sequential", "int8", "hint"]),
        (["generate", "x", "--quantize", "int4"], ["--quantize", "'int4'"]),
        (["generate", "--remake", "file.txt", "--quantize", "int8"], ["--quantize", "no effect beside --remake"]),
        (["generate", "x", "--offload", "gpu"], ["--offload", "'gpu'"]),
        (["generate", "x", "--remake", "file.txt"], ["PROMPT", "no effect beside --remake", "hint"]),
        (["generate", "--remake", "file.txt", "--seed", "0"], ["--seed", "no effect beside --remake"]),
        (["generate", "--remake", "file.txt"], ["file.txt", "not a readable picture", "hint"]),
        (["generate", "--remake", "no.png"], ["no.png", "hint"]),
        (["generate", "x", "--out", "a.jpg"], ["a.jpg", "hint"]),
        (["generate", "x", "y", "--out", "a.png"], ["2 pictures do not fit one file"]),
        (["merge", "MODEL", "no.safetensors", "--out", "m"], ["no such adapter file"]),
        (["merge", "MODEL", "no.safetensors", "--out", "full"], ["already exists", "full"]),
        (["merge", "MODEL", "--out", "m"], ["Missing argument"]),
        (["demo-data", "full"], ["already exists"]),
        (["demo-data", "d", "--count", "0"], ["--count"]),
        (["prepare", "nowhere", "--out", "c", "--model", "MODEL"], ["nowhere", "no such folder"]),
        (["prepare", "PICTURES", "--out", "c", "--model", "MODEL", "--resolution", "100"], ["100", "16"]),
        (["prepare", "PICTURES", "--out", "c", "--model", "MODEL", "--text-padding", "keep"], ["not supported yet"]),
        (["train", "no.yaml"], ["no.yaml", "no such recipe"]),
        (["train", "RECIPE", "out=o", "optimizer.learning_rat=1e-4"], ["unknown key", "learning_rate"]),
        (["train", "RECIPE", "out=o", "sigmas.alpha=1000"], ["sigmas.alpha", "less than or equal to 100, not 1000"]),
        (["train", "RECIPE", "out=o", "model=no/such/model/here"], ["no such model"]),
        (["train", "RECIPE", "out=o", "adapter.targets.0.layers=transformer_block.**"], ["matches no linear layer"]),
        (["train", "RECIPE", "out=o", "data.0.path=nowhere"], ["nowhere", "no such folder"]),
        (["train", "RECIPE", "out=o", "text_padding=bias"], ["text_padding", "not supported yet", "hint"]),
        (["train", "RECIPE", "out=o", "steps=0"], ["steps", "not 0", "hint"]),
        (["train", "RECIPE", "out=o", "device=tpu"], ["device", "hint"]),
        (["train", "RECIPE", "out=o", "device=cuda:7"], ["this machine has no cuda:7", "hint"]),
        (["train", "RECIPE", "out=file.txt"], ["file.txt", "hint"]),
        (["prepare", "PICTURES", "--out", "file.txt", "--model", "MODEL"], ["file.txt", "hint"]),
        (["generate", "x", "--model", "MODEL", "--device", "abacus"], ["device", "hint"]),
        (["generate", "x", "--model", "MODEL", "--out", "file.txt/a.png"], ["file.txt", "is a file", "hint"]),
        (["demo", "--out", "file.txt"], ["file.txt", "is a file", "hint"]),
        (["demo-data", "."], ["hint"]),
        (["train", "RECIPE", "out=o", "base=int4"], ["base", "int8"]),
    ],
    ids=lambda value: " ".join(value[:2])[:40] + str(len(value)) if isinstance(value, list) else None,
)
def test_refusals(
    run: Callable, place: Path, tiny_model_dir: Path, pictures: Path, recipe: Path, args: list[str], parts: list[str]
) -> None:
    names = {"MODEL": str(tiny_model_dir), "PICTURES": str(pictures), "RECIPE": str(recipe)}
    result = run(*(names.get(arg, arg) for arg in args))
    refused(result, *parts)


@pytest.mark.parametrize("fault", ["caption", "picture"])
def test_broken_data_is_named_and_nothing_is_left(
    run: Callable, place: Path, recipe: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory, fault: str
) -> None:
    data = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(pictures, data)
    (data / "metadata.jsonl").unlink()
    victim = sorted(data.glob("*.png"))[2]
    if fault == "caption":
        victim.with_suffix(".txt").unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:200])
    result = run("train", recipe, "out=o", f"data.0.path={data}")
    last = result.err.splitlines()[-1]  # after the progress of preparing
    assert result.code == 2
    assert last.startswith("libreflux: error: ")
    assert victim.name in last
    assert "hint" in last
    assert "transformer_blocks" not in result.err


@pytest.mark.parametrize("part", [".", "checkpoints"])
def test_a_read_only_run_folder_is_one_line_and_stays_as_it_was(
    run: Callable, recipe: Path, trained: Path, tmp_path: Path, part: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained.parent, out)
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    locked = [out / part, *(out / part).rglob("*")]
    for path in locked:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with bound_by_modes():
        result = run("train", recipe, f"out={out}", "steps=4")
    for path in locked:
        path.chmod(0o755 if path.is_dir() else 0o644)
    line = result.err.splitlines()[-1]
    assert result.code == 2
    assert line.startswith(f"libreflux: error: {out}")
    assert "Permission denied; hint: " in line
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == before
    assert run("train", recipe, f"out={out}", "steps=4").code == 0


@pytest.mark.parametrize(("rank", "held", "stays"), [("0", False, False), ("0", True, True), ("1", False, True)])
def test_the_refusal_of_a_new_run_is_told_whoever_holds_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, held: bool, stays: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "run"
    with contextlib.ExitStack() as others:

        def begin() -> None:
            with workflow.no_empty_run(out):
                with files.lock(out):
                    pass
                if held:
                    others.enter_context(files.lock(out))
                raise RecipeError("the refusal")

        with pytest.raises(RecipeError, match="the refusal"):
            begin()
    assert out.exists() == stays


@pytest.mark.parametrize("taken", [False, True])
def test_where_open_files_stay_a_new_runs_folder_goes_after_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """As on Windows; and where another process has taken the lock by then, its folder stays whole."""
    out = tmp_path / "run"
    removed: list[Path] = []
    unlink, rmtree = Path.unlink, shutil.rmtree
    with contextlib.ExitStack() as others:

        def refusing(remove: Callable) -> Callable:
            def checked(path: Path) -> None:
                if taken and not removed:
                    others.enter_context(files.lock(out))
                removed.append(path)
                try:
                    with files.lock(out):
                        pass
                except RunError:
                    raise PermissionError(13, "is open", str(path)) from None
                remove(path)

            return checked

        def begin() -> None:
            with workflow.no_empty_run(out):
                with files.lock(out):
                    (out / "recipe.json").write_text("{}")
                raise RecipeError("the refusal")

        monkeypatch.setattr(workflow, "OPEN_FILES_STAY", True)
        monkeypatch.setattr(Path, "unlink", refusing(unlink))
        monkeypatch.setattr(workflow.shutil, "rmtree", refusing(rmtree))
        with pytest.raises(RecipeError, match="the refusal"):
            begin()
    assert removed[0] == out / ".lock"
    assert out.exists() == taken
    assert (out / "recipe.json").exists() == taken


@pytest.mark.parametrize(
    ("rank", "world", "told"),
    [
        ("zero", "2", "RANK and WORLD_SIZE are not numbers; hint: start it by torchrun"),
        ("0", "", "RANK and WORLD_SIZE are not numbers; hint: start it by torchrun"),
        ("2", "2", "no process has RANK 2 of WORLD_SIZE 2; hint: start it by torchrun, or unset both"),
        (
            "-1",
            "2",
            "no process has RANK -1 of WORLD_SIZE 2; hint: start it by torchrun, or unset both",
        ),
    ],
)
def test_torchruns_numbers_that_are_none_are_one_line(
    run: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, world: str, told: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    for command in (["prepare", tmp_path, "--out", tmp_path / "cache"], ["train", recipe, f"out={tmp_path / 'run'}"]):
        done = run(*command)
        assert (done.code, done.err) == (2, f"libreflux: error: environment: {told}\n")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def test_a_bug_keeps_its_traceback(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(generate, "picture_paths_of", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("generate", "x")


def test_the_process_exits_with_2_and_prints_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "libreflux", "generate", "x", "--out", "x.gif"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("libreflux: error: x.gif: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "where"),
    [
        *(
            (["generate", "x", option, ""], option)
            for option in ("--model", "--base", "--comfyui", "--adapter", "--device", "--out", "--sigmas", "--remake")
        ),
        *((["grid", "x", option, ""], option) for option in ("--model", "--seeds", "--guidance", "--steps", "--out")),
        *(
            (["probe", "emoji-libre", option, ""], option)
            for option in (
                "--adapter",
                "--against",
                "--reference",
                "--data",
                "--out",
                "--seen",
                "--judge",
                "--features",
                "--dtype",
            )
        ),
        (["generate", "x", "--model="], "--model"),
        (["generate", "x", "--no-metadata", "--model", ""], "--model"),
        (["prepare", ""], "DATA..."),
        (["prepare", "full", "--out", ""], "--out"),
        (["train", ""], "RECIPE"),
        (["train", "r.yaml", ""], "[KEY=VALUE]..."),
        (["merge", "", "a.safetensors", "--out", "y"], "MODEL"),
        (["merge", "emoji-libre", "", "--out", "y"], "ADAPTER[:WEIGHT]..."),
        (["average", "", "--out", "y.safetensors"], "RUN"),
        (["probe", ""], "MODEL"),
        (["export", "", "--int8", "--out", "y"], "[MODEL|ADAPTER]"),
        (["demo-data", ""], "OUT"),
        (["demo", "--out", ""], "--out"),
    ],
)
def test_an_empty_argument_is_refused(run: Callable, place: Path, args: list[str], where: str) -> None:
    """A variable of the shell that is not set: never the default, and never the folder that one stands in."""
    refused(run(*args), f"{where}: is empty", "is a variable not set?")


@pytest.mark.parametrize("key", ["model", "adapter.init_from", "cache", "threads", "guidance", "data.0.path"])
def test_an_empty_override_is_refused(run: Callable, recipe: Path, key: str) -> None:
    refused(run("train", recipe, "--dry-run", f"{key}="), f"{key}=: is empty", "null for none")


def test_an_empty_text_is_a_text(run: Callable, place: Path) -> None:
    """What is refused here is the missing model alone."""
    for options in (["", "--negative", "", "--prompt-2", "", "--negative-2", ""], ["x", "--negative="]):
        refused(run("generate", *options, "--model", "emoji-bas"), "did you mean emoji-base?")


def test_no_name_is_no_model(place: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model_dir)
    with pytest.raises(ModelError, match="no model is named"):
        locate("")
    with pytest.raises(RecipeError, match=r"^base: is empty"):
        chosen_model(None, "", Path("models"))

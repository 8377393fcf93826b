"""A captioned folder that a model draws: the same pictures whatever their number, their batch or a kill in between."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import libreflux
from libreflux.data.sources import read
from libreflux.errors import LibrefluxError, OptionError, RunError
from libreflux.recipe import DataSource
from libreflux.sample.metadata import read_record
from libreflux.workflows import adapters
from libreflux.workflows.drawing import AdaptedSource
from libreflux.workflows.drawn_folder import DrawnFolder
from libreflux.workflows.generate_folder import GenerateFolderOptions
from tiny import tiny_transformer

PROMPTS = ["a red apple", "a small green frog on blue", "# an owl"]
QUICK: dict[str, Any] = {"steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


Draw = Callable[..., Any]


@pytest.fixture(scope="module")
def draw(tiny_model_dir: Path, prompts: Path) -> Draw:
    def call(out: Path, **options: Any) -> Any:
        return libreflux.generate_folder(prompts, out=out, **{"model": tiny_model_dir, **QUICK, **options})

    return call


@pytest.fixture(scope="module")
def seven(draw: Draw, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures at once; read it only."""
    out: Path = tmp_path_factory.mktemp("drawn") / "seven"
    assert draw(out, count=7).drawn == 7
    return out


def files(folder: Path) -> dict[str, bytes]:
    """What others see of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_folder_is_data_with_its_prompts_as_captions(seven: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    found = read(DataSource(path=str(seven)))
    samples = sorted(found.samples, key=lambda one: one.file)
    assert [one.path.name for one in samples] == [f"{index:06d}.png" for index in range(7)]  # all of them differ
    assert [one.captions for one in samples] == [(PROMPTS[index % 3],) for index in range(7)]
    assert found.origins == {"text": 7, ".txt": 7}
    assert not found.quarantined
    rows = [json.loads(line) for line in (seven / "metadata.jsonl").read_text("utf-8").splitlines()]
    records = [read_record(one.path) for one in samples]
    assert [(row["text"], row["seed"]) for row in rows] == [(one.prompt, one.seed) for one in records]
    assert len({one.seed for one in records}) == 7
    assert all((one.steps, one.width, one.batch) == (2, 32, 1) for one in records)
    prepared = libreflux.prepare(seven, model=str(tiny_model_dir), resolution=[32], out=tmp_path / "cache")
    assert prepared.pictures == 7


def test_a_picture_is_the_same_whatever_the_count_and_is_drawn_once(draw: Draw, seven: Path, tmp_path: Path) -> None:
    out, written = tmp_path / "out", list[Path]()
    assert draw(out, count=2).drawn == 2
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "000001.txt").unlink()
    (out / ".000004.png.tmp-0123abcd").write_bytes(b"of a killed process")
    found = draw(out, count=7, on_picture=written.append)
    assert (found.pictures, found.drawn) == (7, 6)
    assert [path.name for path in written] == [f"{index:06d}.png" for index in range(1, 7)]
    assert files(out) == files(seven)
    assert (out / "000000.png").stat().st_mtime_ns == before["000000.png"]
    assert not list(out.glob(".*tmp*"))
    cut = (out / "000003.png").read_bytes()[:-5]
    (out / "000003.png").write_bytes(cut)  # as after a copy that failed
    assert draw(out, count=7).drawn == 1
    assert files(out) == files(seven)
    assert draw(out, count=7).drawn == 0


def test_hidden_files_and_folders_of_the_user_stay(draw: Draw, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".deleted-photos", ".tmpabc123", ".mine.staging-0123abcd"):
        (out / name).mkdir(parents=True)
        (out / name / "precious.txt").write_text("mine")
    (out / ".a.png.tmp-0123abcd").write_bytes(b"mine too")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert draw(out, count=1).drawn == 1
    assert draw(out, count=2).drawn == 1  # and not at the second call either, when the folder is ours
    assert {path: path.read_bytes() for path in before} == before


def test_pictures_of_a_batch_are_the_same_whatever_was_there_and_all_but_those_drawn_alone(
    draw: Draw, seven: Path, tmp_path: Path
) -> None:
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    assert draw(whole, count=7, batch=3).drawn == 7
    assert draw(grown, count=4, batch=3).drawn == 4
    (grown / "000001.png").unlink()
    assert draw(grown, count=7, batch=3).drawn == 4
    assert files(grown) == files(whole)
    for path in sorted(whole.glob("*.png")):
        together, alone = (np.asarray(Image.open(each), np.int16) for each in (path, seven / path.name))
        assert together.std() > 1
        assert np.abs(together - alone).max() <= 1
    again = libreflux.remake(whole / "000004.png")
    assert again.differences == ("the batch was 3, is 1",)
    assert again.record == dataclasses.replace(read_record(seven / "000004.png"), model=again.record.model)


def test_of_many_prompts_some_hundred_are_encoded_at_once(
    draw: Draw, seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, load = list[int](), AdaptedSource.load
    told: list[tuple[str, int, int]] = []

    def counted(source: AdaptedSource, *rest: Any) -> Any:
        assert rest[-1] == 7 * 2 * 2  # all of the work decides whether compiling pays: two steps, guided
        session = load(source, *rest)
        held.append(len(session.texts))
        return session

    @contextmanager
    def progress(what: str, unit: str = "step") -> Iterator[Callable[..., None]]:
        yield lambda done, total, note="", begun=False: None if note else told.append((what, done, total))

    monkeypatch.setattr(AdaptedSource, "load", counted)
    monkeypatch.setattr(sys.modules[GenerateFolderOptions.__module__], "AT_ONCE", 2)
    draw(tmp_path / "out", count=7, progress=progress)
    assert held == [3, 3, 3, 2]  # of two prompts, at last of one, with the negative prompt
    assert files(tmp_path / "out") == files(seven)
    assert [row[1:] for row in told if row[0] == "encoding"][:4] == [(1, 3), (2, 3), (3, 3), (1, 3)]
    drawn = [done for what, done, _ in told if what == "drawing"]
    assert drawn == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]


def test_each_picture_is_drawn_again_from_itself(seven: Path) -> None:
    again = libreflux.remake(seven / "000004.png")
    assert again.same_pixels
    assert again.differences == ()


def test_a_killed_command_is_gone_on_with_to_the_same_bytes(
    draw: Draw, seven: Path, prompts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = ["generate", "--prompts", prompts, "--count", 3000, "--model", tiny_model_dir, "--out", out]
    words += [word for name, value in QUICK.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "libreflux", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "000002.png").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert (out / "000002.png").exists(), process.communicate()[1]
    process.wait()
    there = len(list(out.glob("*.png")))
    assert not (out / "metadata.jsonl").exists()
    assert len(read(DataSource(path=str(out))).samples) == there  # what a kill leaves is data already
    assert draw(out, count=there + 1).drawn == 1
    whole = tmp_path / "whole"
    draw(whole, count=there + 1)
    assert files(out).keys() == files(whole).keys()
    assert files(out) == files(whole)


def test_ctrl_c_says_how_to_go_on(
    run: Callable[..., Any], prompts: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out", DrawnFolder.write
    words = ["generate", "--prompts", prompts, "--count", 4, "--model", tiny_model_dir, "--out", out, "--steps", 1]

    def stopped(folder: DrawnFolder, index: int, *rest: Any) -> Path:
        if index == 2:
            raise KeyboardInterrupt
        return write(folder, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(DrawnFolder, "write", stopped)
        found = run(*words)
    assert found.code == 130
    assert f"stopped: 2 pictures in {out}; the same command goes on from there" in found.err
    done = run(*words)
    assert done.code == 0
    assert done.out == f"{out}: 4 pictures, 2 of them there before\n"
    assert "drawing: 4/4" in done.err


def test_a_folder_that_was_begun_with_something_else_is_refused_by_name(
    draw: Draw, seven: Path, prompts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tiny_transformer(seed=5).save_pretrained(other / "transformer")
    longer = tmp_path / "longer.txt"
    longer.write_text(prompts.read_text() + "a tree\n")
    for changed, told in (
        ({"steps": 3}, "steps 2 instead of 3"),
        ({"guidance": 4, "negative": "a frog"}, "negative none instead of a frog, guidance 3.0 instead of 4.0"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"batch": 2}, "batch 1 instead of 2"),
        ({"width": 48}, "width 32 instead of 48"),
        ({"metadata": False}, "metadata True instead of False"),
        ({"quantize": "int8"}, "quantize none instead of int8"),
        ({"model": other}, "other model (transformer)"),
        ({"count": 6}, "has 7 pictures already, more than `count` 6"),
    ):
        with pytest.raises(RunError) as refused:
            draw(seven, **{"count": 7, **changed})
        assert told in str(refused.value)
        assert "hint: " in str(refused.value)
    with pytest.raises(RunError, match="was begun with other prompts; hint"):
        libreflux.generate_folder(longer, out=seven, model=tiny_model_dir, **QUICK)
    renamed = shutil.copytree(tiny_model_dir, tmp_path / "renamed")  # by another name the same model
    assert draw(seven, count=7, model=renamed, offload="none").drawn == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "photo.jpg").write_bytes(b"")
    with pytest.raises(RunError, match=r"is not empty \(photo.jpg\)"):
        draw(foreign)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"count": 0}, OptionError, "count: cannot be 0"),
        ({"batch": 0}, OptionError, "batch: cannot be 0"),
        ({"seed": -1}, OptionError, "seed: cannot be -1"),
        ({"guidance": 1, "negative": "a frog"}, OptionError, "negative: has no effect at guidance 1"),
        ({"steps": 2, "sigmas": [1, 0.5]}, OptionError, "steps: has no effect beside `sigmas`"),
        ({"width": 40}, OptionError, "width: 40 is not a multiple of 16"),
        ({"offload": "model"}, OptionError, "offload: model is of no use on cpu"),
        ({"max_tokens": 10_000}, OptionError, "max_tokens: cannot be 10000"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_there_is_a_folder(
    draw: Draw, tmp_path: Path, options: dict[str, Any], error: type[LibrefluxError], told: str
) -> None:
    with pytest.raises(error) as refused:
        draw(tmp_path / "out", **options)
    assert told in str(refused.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match="is a picture's name"):
        draw(tmp_path / "out.png")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a fox"], "PROMPT: has no effect beside --prompts"),
        (["--prompt-2", "a fox"], "--prompt-2: has no effect beside --prompts"),
        (["--remake", "a.png"], "--prompts: has no effect beside --remake"),
        (["--count", "0"], "Invalid value for '--count'"),
        (["--width", "40"], "--width: 40 is not a multiple of 16"),
    ],
)
def test_options_that_make_no_sense_together_are_one_line(
    run: Callable[..., Any], prompts: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    found = run("generate", "--prompts", prompts, "--out", tmp_path / "out", *words)
    assert found.code == 2
    assert told in found.err
    assert len(found.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    alone = run("generate", "a fox", "--batch", 2)
    assert alone.err == "libreflux: error: --batch: has no effect without --prompts; hint: remove it\n"


def test_a_folder_of_pictures_gives_the_prompts_and_one_picture_of_each(
    run: Callable[..., Any], seven: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    words = ["--model", tiny_model_dir, "--steps", 1, "--guidance", 4, "--negative", "a frog", "--no-metadata"]
    assert run("generate", "--prompts", seven, "--out", tmp_path / "out", *words).code == 0
    captions = [path.read_text("utf-8").strip() for path in sorted((tmp_path / "out").glob("*.txt"))]
    assert captions == [PROMPTS[index % 3] for index in range(7)]
    with pytest.raises(LibrefluxError, match="says nothing of how it was made"):
        read_record(tmp_path / "out" / "000000.png")


def test_a_folder_among_its_own_prompts_is_refused(draw: Draw, seven: Path, tmp_path: Path) -> None:
    prompts = shutil.copytree(seven, tmp_path / "prompts", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "link").symlink_to(prompts)
    before = files(prompts)
    for out in (prompts, prompts / "new", tmp_path / "link" / "a" / "b"):
        with pytest.raises(OptionError, match="from which the prompts are read: it would add to them; hint: name a"):
            libreflux.generate_folder(prompts, out=out, **QUICK)
    assert files(prompts) == before


def test_every_option_is_described_and_the_example_runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = (libreflux.generate_folder.__doc__ or "").partition("Args:")[2]
    lines = [line.strip().partition(":")[0] for line in described.splitlines() if ":" in line]
    known = {name for line in lines for name in line.split(", ")}
    assert not {field.name for field in dataclasses.fields(GenerateFolderOptions)} - known
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "default_model", lambda _: str(tiny_model_dir))  # emoji-libre takes longer
    example = (libreflux.generate_folder.__doc__ or "").partition("Example::\n\n")[2].partition("\n\nArgs:")[0]
    exec("if True:\n" + example, {})
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4

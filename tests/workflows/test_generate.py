"""Pictures, the same picture again and grids from Python: the bytes of the commands, and silence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import libreflux
from libreflux.cli import main
from libreflux.errors import LibrefluxError, OptionError, RecipeError
from libreflux.sample import metadata
from libreflux.sample.metadata import read_record
from libreflux.workflows import adapters
from libreflux.workflows.generate import GenerateOptions
from libreflux.workflows.grid import GridOptions
from libreflux.workflows.progress import silent
from libreflux.workflows.remake import RemakeOptions
from tiny import change_json, tiny_transformer


def command(*words: object) -> str:
    """`libreflux WORDS`, which must succeed: its stdout."""
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["libreflux", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert not end.value.code, err.getvalue()
    return out.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for what grids remember of files and the lock."""
    found = (path for path in folder.rglob("*") if path.suffix in (".png", ".html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA that was trained with other steps and guidance than the tiny model has."""
    path = tmp_path / "lora.safetensors"
    made = torch.Generator().manual_seed(1)
    name = "transformer.transformer_blocks.0.attn.to_q"
    sides = {"lora_A": (4, 32), "lora_B": (32, 4)}
    tensors = {f"{name}.{side}.weight": torch.randn(shape, generator=made) for side, shape in sides.items()}
    save_file(tensors, path, metadata={"text_padding": "drop", "sampling_steps": "3", "guidance": "2.5"})
    return path


def test_a_picture_under_an_adapter_is_the_commands(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["a fox", "an owl", "--model", tiny_model_dir, "--adapter", f"{adapter}:0.8", "--seed", 3, "--count", 2]
    told = command("generate", *words, "--negative", "blue", "--out", tmp_path / "command")
    capfd.readouterr()
    written: list[Path] = []
    result = libreflux.generate(
        ["a fox", "an owl"],
        model=tiny_model_dir,
        adapters=[f"{adapter}:0.8"],
        seed=3,
        count=2,
        negative="blue",
        out=tmp_path / "python",
        on_picture=written.append,
    )
    assert capfd.readouterr() == ("", "")
    assert len(files(tmp_path / "python")) == 4
    assert files(tmp_path / "python") == files(tmp_path / "command")
    assert [path.name for path in written] == [Path(line).name for line in told.splitlines()]
    assert [one.path for one in result.pictures] == written
    assert [(one.record.prompt, one.record.seed) for one in result.pictures] == [
        ("a fox", 3),
        ("a fox", 4),
        ("an owl", 3),
        ("an owl", 4),
    ]
    for one in result.pictures:
        assert one.image is None
        assert one.path is not None
        assert read_record(one.path) == one.record
        assert (one.record.steps, one.record.guidance) == (3, 2.5)  # the adapter's
    plain = libreflux.generate("a fox", model=tiny_model_dir, negative="blue", seed=3).pictures[0]
    assert (plain.record.steps, plain.record.guidance) == (4, 3.0)


def test_every_option_is_the_commands(tiny_model_dir: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "negative": "a rocket",
        "guidance": 4,
        "guidance_start": 0.25,
        "guidance_stop": 0.75,
        "guidance_rescale": 1,
        "sigmas": (1, 0.8, 0.5, 0.3),
        "seed": 9,
        "width": 48,
        "prompt_2": "a tree, tall",
        "negative_2": "",
        "max_tokens": 4,
        "device": "cpu",
        "quantize": "int8",
        "offload": "none",
        "model": tiny_model_dir,
    }
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    words[words.index("--sigmas") + 1] = "1,0.8,0.5,0.3"
    for metadata_too in (True, False):
        bare = [] if metadata_too else ["--no-metadata"]
        command("generate", "a fox", *words, "--batch-cfg", "on", "--tile", *bare, "--out", tmp_path / "command.png")
        libreflux.generate(
            "a fox", **given, batch_cfg=True, tile=True, metadata=metadata_too, out=str(tmp_path / "python.png")
        )
        assert (tmp_path / "python.png").read_bytes() == (tmp_path / "command.png").read_bytes()


def test_without_a_place_the_result_has_the_pictures(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (held,) = libreflux.generate("a fox", model=tiny_model_dir, steps=2).pictures
    assert held.path is None
    assert not list(tmp_path.iterdir())
    (written,) = libreflux.generate("a fox", model=tiny_model_dir, steps=2, out="x.png").pictures
    assert written.path == Path("x.png")
    assert held.image is not None
    with Image.open("x.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(held.image))


def test_a_picture_again_is_the_commands(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "a.png"
    libreflux.generate("a fox", model=tiny_model_dir, adapters=f"{adapter}:0.5", out=first)
    command("generate", "--remake", first, "--adapter", adapter, "--out", tmp_path / "command.png")
    capfd.readouterr()
    again = libreflux.remake(first, adapters=[adapter], out=tmp_path / "python.png")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "python.png").read_bytes() == (tmp_path / "command.png").read_bytes() == first.read_bytes()
    assert again.same_pixels
    assert again.differences == ()
    assert again.path == tmp_path / "python.png"
    assert again.comparison == f"bit for bit the pixels of {first}"
    with pytest.raises(LibrefluxError, match=r"hint: name another place with `out`"):
        libreflux.remake(first, adapters=[adapter], out=first)
    with pytest.raises(LibrefluxError, match=r"hint: give `adapters` .*lora.safetensors, from where"):
        libreflux.remake(first)


def test_what_differs_is_told_before_it_is_drawn(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    libreflux.generate("a fox", model=model, out=tmp_path / "a.png")
    tiny_transformer(seed=5).save_pretrained(model / "transformer")
    told: list[str] = []

    @contextlib.contextmanager
    def progress(what: str, unit: str = "step") -> Any:
        assert len(told) == 1  # before the first step
        with silent(what, unit) as report:
            yield report

    again = libreflux.remake(tmp_path / "a.png", on_difference=told.append, progress=progress)
    assert again.differences == tuple(told)
    assert told[0].startswith("the transformer's hash was ")
    assert not again.same_pixels
    assert "of its pixels differ from" in again.comparison
    assert again.path is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "model"]


def test_a_grid_is_the_commands(
    tiny_model_dir: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_model_dir, "--adapter", f"{adapter}:0.8", "--guidance", "1,3", "--steps", "1,2"]
    command("grid", "a fox", *words, "--seeds", "0:1", "--negative", "blue", "--out", tmp_path / "command")
    capfd.readouterr()
    given: dict[str, Any] = {
        "model": tiny_model_dir,
        "adapters": [f"{adapter}:0.8"],
        "guidance": [1, 3],
        "steps": (1, 2),
        "seeds": range(2),
        "negative": "blue",
        "out": tmp_path / "python",
    }
    result = libreflux.grid("a fox", **given)
    assert capfd.readouterr() == ("", "")
    assert len(files(tmp_path / "python")) == 10
    assert files(tmp_path / "python") == files(tmp_path / "command")
    assert (result.sheet, result.page) == (tmp_path / "python" / "grid.png", tmp_path / "python" / "index.html")
    assert (result.drawn, result.total) == (8, 8)
    assert libreflux.grid("a fox", **given).drawn == 0
    for seed, row in enumerate(result.cells):
        told = [(cell.record.seed, cell.record.steps, cell.record.guidance) for cell in row]
        assert told == [(seed, 1, 1.0), (seed, 1, 3.0), (seed, 2, 1.0), (seed, 2, 3.0)]
        assert all(read_record(cell.path) == cell.record for cell in row)


def test_a_guidance_distilled_models_scale_is_its_embedded_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "dev")
    tiny_transformer(guidance_embeds=True).save_pretrained(model / "transformer")
    change_json(model / "libreflux.json", guidance_embeds=True, guidance=3.5)
    (drawn,) = libreflux.generate("a fox", model=model, steps=1).pictures
    ((cell,),) = libreflux.grid("a fox", model=model, steps=[1], out=tmp_path / "grid").cells
    for record in (drawn.record, cell.record):
        assert (record.guidance, record.embedded_guidance) == (1.0, 3.5)
    with Image.open(cell.path) as picture:
        assert drawn.image is not None
        assert picture.tobytes() == drawn.image.tobytes()


def test_a_cell_that_is_missing_is_not_searched_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a whole folder for names that are near would take longer for every cell that is there."""
    monkeypatch.setattr(metadata, "did_you_mean", lambda *_: pytest.fail("searched"))
    assert libreflux.grid("a fox", model=tiny_model_dir, steps=[1], out=tmp_path).drawn == 1


@pytest.mark.parametrize(
    ("options", "workflow"),
    [
        (GenerateOptions, libreflux.generate),
        (GridOptions, libreflux.grid),
        (RemakeOptions, libreflux.remake),
    ],
)
def test_every_option_is_described(options: type, workflow: Callable[..., Any]) -> None:
    described = (workflow.__doc__ or "").partition("Args:")[2]
    lines = [line.strip().partition(":")[0] for line in described.splitlines() if ":" in line]
    known = {name for line in lines for name in line.split(", ")}
    assert not {field.name for field in dataclasses.fields(options)} - known
    assert issubclass(OptionError, RecipeError)


def test_the_examples_run(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "default_model", lambda _: str(tiny_model_dir))  # emoji-libre takes longer
    for workflow in (libreflux.generate, libreflux.remake, libreflux.grid):
        example = (workflow.__doc__ or "").partition("Example::\n\n")[2].partition("\n\nArgs:")[0]
        assert example.count("\n") >= 3
        exec("if True:\n" + example, {})
    assert {"fox.png", "pictures", "grid"} <= {path.name for path in tmp_path.iterdir()}

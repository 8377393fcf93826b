"""Single files and ComfyUI's folders through the verbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from libreflux.model.opening import open_model
from libreflux.sample.metadata import read_record
from opened import opened


@pytest.fixture(scope="module")
def comfyui(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as ComfyUI would hold it, its parts in folders of their own."""
    out = tmp_path_factory.mktemp("comfyui")
    opened(tiny_model_dir).save_files(out / "flat")
    for folder, names in {
        "unet": ["flux1-*"],
        "clip": ["clip_l*", "t5xxl*"],
        "vae": ["ae*"],
        "comfy": ["*_tokenizer"],
    }.items():
        (out / "models" / folder).mkdir(parents=True)
        for name in names:
            for path in (out / "flat").glob(name):
                path.rename(out / "models" / folder / path.name)
    return out


def test_every_way_to_the_same_model_draws_the_same_picture(
    run: Callable, tiny_model_dir: Path, comfyui: Path, tmp_path: Path
) -> None:
    [single] = comfyui.rglob("flux1-*")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(single), bare)
    ways = {
        "folder": ["--model", tiny_model_dir],
        "comfyui": ["--comfyui", comfyui],
        "file": ["--model", single, "--base", tiny_model_dir],
        "bare": ["--model", bare, "--base", tiny_model_dir, "--comfyui", comfyui],
    }
    for name, options in ways.items():
        done = run("generate", "a fox on yellow", *options, "--no-metadata", "--out", tmp_path / f"{name}.png")
        assert done.code == 0, done.err
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ways}) == 1


def test_a_picture_of_a_single_file_is_remade_and_compared(run: Callable, comfyui: Path, tmp_path: Path) -> None:
    [single] = comfyui.rglob("flux1-*")
    assert run("generate", "a fox", "--comfyui", comfyui, "--out", tmp_path / "a.png").code == 0
    assert read_record(tmp_path / "a.png").model == str(single)
    done = run("generate", "--remake", tmp_path / "a.png", "--comfyui", comfyui, "--out", tmp_path / "b.png")
    assert done.code == 0, done.err
    assert "bit for bit" in done.err, done.err
    done = run("generate", "--remake", tmp_path / "a.png", "--out", tmp_path / "c.png")
    assert done.code == 2
    assert "--base" in done.err
    done = run(
        "grid",
        "a fox",
        "--comfyui",
        comfyui,
        "--model",
        single,
        "--model",
        "emoji-libre",
        "--steps",
        "1",
        "--width",
        "32",
        "--height",
        "32",
        "--out",
        tmp_path / "grid",
    )
    assert done.code == 0, done.err
    assert "2 of 2 cells" in done.out, done.err


def test_merge_and_int8_make_folders_of_single_files(
    run: Callable, comfyui: Path, trained: Path, tmp_path: Path
) -> None:
    [single] = comfyui.rglob("flux1-*")
    done = run("merge", single, f"{trained}:0", "--comfyui", comfyui, "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    assert open_model(tmp_path / "merged").facts.lineage["base"] == str(single)
    done = run("export", single, "--comfyui", comfyui, "--int8", "--out", tmp_path / "int8")
    assert done.code == 0, done.err
    assert "sha256" in open_model(tmp_path / "int8").facts.lineage["quantised"]
    done = run("generate", "a fox", "--model", tmp_path / "int8", "--out", tmp_path / "a.png")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "emoji-libre", "--base", "emoji-base"], "--base: has no effect without a single file"),
        (["--model", "emoji-libre", "--comfyui", "DIR"], "--comfyui: has no effect beside emoji-libre"),
        (["--model", "gone.safetensors"], "gone.safetensors: no such file"),
        (["--model", "FILE"], "no vae in this file; hint: name with --base"),
        (["--model", "FILE", "--base", "no-such"], "no such model: no-such"),
        (["--comfyui", "gone"], "gone: no such folder"),
        (["--comfyui", "EMPTY"], "0 files are called flux1-"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    run: Callable, comfyui: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    named = {"DIR": comfyui, "FILE": next(comfyui.rglob("flux1-*")), "EMPTY": tmp_path / "empty"}
    done = run("generate", "a fox", *[named.get(one, one) for one in options], "--out", tmp_path / "a.png")
    assert done.code == 2, done.err
    assert message in done.err, done.err
    assert not (tmp_path / "a.png").exists(), done.err
    assert len([line for line in done.err.splitlines() if "error" in line]) == 1


def test_verbs_that_want_a_folder_say_how_to_make_one(
    run: Callable, comfyui: Path, recipe: Path, tmp_path: Path
) -> None:
    [single] = comfyui.rglob("flux1-*")
    training = ["train", recipe, f"model={single}", f"out={tmp_path / 'run'}"]
    for command in (["probe", single], training, [*training, "--dry-run"]):
        done = run(*command)
        assert done.code == 2, done.err
        assert "hint: `libreflux export` for diffusers, with its base, makes a model of it" in done.err, done.err

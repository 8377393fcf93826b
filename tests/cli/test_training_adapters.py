"""A training adapter and the adapter that was trained with it, as the commands take or refuse them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from libreflux.recipe import load_recipe
from libreflux.workflows.next_steps import commands, finished

REFUSED = "is a training adapter, which is on only while another one is trained"


def _like(trained: Path, out: Path, **metadata: str) -> Path:
    with safe_open(trained, framework="pt") as file:
        save_file(load_file(trained), out, {**file.metadata(), **metadata})
    return out


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training adapter."""
    return _like(trained, tmp_path_factory.mktemp("made") / "made.safetensors", role="training_adapter")


@pytest.fixture(scope="module")
def style(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained with one."""
    told = {"training_adapter": "made.safetensors", "training_adapter_sha256": "abcdef" * 10}
    return _like(trained, tmp_path_factory.mktemp("style") / "style.safetensors", **told)


def test_what_draws_or_makes_a_model_refuses_a_training_adapter(
    run: Callable, made: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", tiny_model_dir
    for words in (
        ("generate", "a fox", "--model", model, "--adapter", made, "--out", out),
        ("grid", "a fox", "--model", model, "--adapter", made, "--out", out),
        ("merge", model, f"{made}:0.5", "--out", out),
        ("export", made, "--for", "comfyui", "--out", out.with_suffix(".safetensors")),
    ):
        done = run(*words)
        assert (done.code, REFUSED in done.err) == (2, True), done.err
        assert "adapter.training_adapter" in done.err
    assert list(tmp_path.iterdir()) == []


def test_diff_makes_an_ordinary_adapter_of_one(run: Callable, made: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary.safetensors"
    done = run("diff", tiny_model_dir, made, "--rank", "4", "--out", ordinary)
    assert done.code == 0, done.err
    assert run("merge", tiny_model_dir, ordinary, "--out", tmp_path / "model").code == 0


def test_the_result_is_used_as_any_other_and_says_what_it_was_trained_with(
    run: Callable, style: Path, trained: Path, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "was trained with the training adapter made.safetensors (abcdefabcd), and is used without it"
    done = run("merge", tiny_model_dir, style, "--out", tmp_path / "model")
    assert done.code == 0, done.err
    names = []
    for file in (style, trained):
        out = tmp_path / f"{file.stem}-out.safetensors"
        done = run("export", file, "--for", "diffusers", "--rank", "4", "--out", out)
        assert done.code == 0, done.err
        names.append(sorted(load_file(out)))
    assert names[0] == names[1]
    assert caplog.text.count(told) == 1  # of three commands, once is enough


def test_the_end_of_a_run_that_makes_one_says_what_it_is_for(tmp_path: Path) -> None:
    given = ["data=[{path: photos}]", "resolution=32", "steps=2", "out=runs/made", "adapter.role=training_adapter"]
    recipe = load_recipe(None, given)
    assert "adapter.training_adapter: runs/made/adapter.safetensors" in finished(recipe, 0)
    assert commands(recipe) == ["libreflux recipe adapter.training_adapter"]

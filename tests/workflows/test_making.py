"""Merging, averaging and exporting from Python: the bytes that the commands write, and nothing printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import libreflux
from libreflux.errors import OptionError, RunError


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, or the one file."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def silence(capfd: pytest.CaptureFixture[str]) -> Callable[[], None]:
    """Fails where something was printed since the last call, or the test's begin."""

    def check() -> None:
        assert capfd.readouterr() == ("", "")

    return check


def test_merge(
    run: Callable[..., Any], tiny_model_dir: Path, trained: Path, tmp_path: Path, silence: Callable[[], None]
) -> None:
    named = f"{trained.parent}:0.5"
    made = libreflux.merge(str(tiny_model_dir), adapters=[named], out=str(tmp_path / "python"))
    silence()
    done = run("merge", tiny_model_dir, named, "--out", tmp_path / "command")
    assert done.code == 0
    assert f"{len(made.changed)} layers changed, by " in done.out
    assert made.out == tmp_path / "python"
    assert files(made.out) == files(tmp_path / "command")
    assert len(files(made.out)) > 5
    assert all("attn" in name for name in made.changed)
    with pytest.raises(RunError, match="already exists"):
        libreflux.merge(str(tiny_model_dir), adapters=[named], out=made.out)


@pytest.mark.parametrize("how", [{"width": 0.1}, {"width": 0.1, "step": 2}, {"lerp": 0.4}])
def test_average(
    run: Callable[..., Any], trained: Path, tmp_path: Path, silence: Callable[[], None], how: dict[str, Any]
) -> None:
    made = libreflux.average(trained.parent, out=tmp_path / "python.safetensors", **how)
    silence()
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    done = run("average", trained.parent, *words, "--out", tmp_path / "command.safetensors")
    assert done.code == 0, done.err
    assert made.out.read_bytes() == (tmp_path / "command.safetensors").read_bytes()
    assert (made.error is None) == ("lerp" in how)
    assert made.gap >= 0
    if len(made.steps) > 1:
        assert f"{made.gap:.2%}" in done.out
        assert made.worst[0] in done.out


def test_an_average_of_nothing_named_is_refused_in_the_callers_words(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(OptionError, match=r"^one of `width` and `lerp` is needed; hint: `width` 0\.1 is a good"):
        libreflux.average("nowhere", out=out)
    with pytest.raises(OptionError, match=r"^`step` belongs to `width`; hint: remove it$"):
        libreflux.average("nowhere", out=out, lerp=0.5, step=2)
    told = "libreflux: error: one of --width and --lerp is needed; hint: --width 0.1 is a good start\n"
    assert run("average", "nowhere", "--out", out).err == told
    told = "libreflux: error: --step belongs to --width; hint: remove it\n"
    assert run("average", "nowhere", "--out", out, "--lerp", 0.5, "--step", 2).err == told


@pytest.mark.parametrize(
    ("options", "words", "name"),
    [
        ({"int8": True}, ["--int8"], "model"),
        ({"program": "diffusers"}, ["--for", "diffusers"], "model"),
        ({"program": "bfl"}, ["--for", "bfl"], "model.safetensors"),
    ],
)
def test_export_of_a_model(
    run: Callable[..., Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    silence: Callable[[], None],
    options: dict[str, Any],
    words: list[str],
    name: str,
) -> None:
    made = libreflux.export(str(tiny_model_dir), out=tmp_path / "python" / name, **options)
    silence()
    done = run("export", tiny_model_dir, *words, "--out", tmp_path / "command" / name)
    assert done.code == 0, done.err
    assert files(made.out) == files(tmp_path / "command" / name)
    assert made.size == sum(map(len, files(made.out).values())) > 0
    assert f"{made.size / 1e6:,.1f} MB" in done.out


def test_export_of_an_adapter(
    run: Callable[..., Any], trained: Path, tmp_path: Path, silence: Callable[[], None]
) -> None:
    out = tmp_path / "python.safetensors"
    made = libreflux.export(str(trained.parent), program="kohya", rank=2, out=out)
    silence()
    done = run("export", trained.parent, "--for", "kohya", "--rank", 2, "--out", tmp_path / "command.safetensors")
    assert done.code == 0, done.err
    assert out.read_bytes() == (tmp_path / "command.safetensors").read_bytes()
    assert 0 < made.lost < 1
    assert f"{made.lost:.1%} of the adapter is lost" in done.out


def test_an_export_that_cannot_be_meant_is_refused_in_the_callers_words(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    with pytest.raises(OptionError, match=r"^int8, program: one of them is needed; hint: write `int8` or `prog"):
        libreflux.export(str(tiny_model_dir), out=out)
    with pytest.raises(OptionError, match=r"^rank: has no effect on a model; hint: remove it$"):
        libreflux.export(str(tiny_model_dir), out=out, int8=True, rank=2)
    told = "libreflux: error: --int8, --for: one of them is needed; hint: write --int8 or --for diffusers\n"
    assert run("export", tiny_model_dir, "--out", out).err == told
    with pytest.raises(OptionError, match=r"^what: nothing to export"):
        libreflux.export(out=out, int8=True)
    assert "libreflux: error: MODEL: nothing to export" in run("export", "--int8", "--out", out).err

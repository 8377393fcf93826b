"""`libreflux probe --features CLIP --ocr`: agreement and letters by guidance and steps, told, kept, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lettered import make_tiny_clip, sign
from libreflux.data import encode
from libreflux.errors import OptionError
from libreflux.probing.context import ProbeContext
from libreflux.probing.metrics.wilson import wilson
from libreflux.probing.reader import Reader
from libreflux.probing.results import Measure, Result, read_result
from libreflux.probing.unit_table import COLUMNS, rows
from libreflux.workflows import probe_options
from workflows.quick import measure_less

CAPTIONS = ['a sign that says "OPEN"', 'a sign that says "OPEN NOW" and “24”', "a red apple on blue"]
SMALL = ["--quick", "--prompts", 3, "--guidance", "1,2", "--steps", "1,2", "--resolution", 32, "--dtype", "fp32"]


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, two of whose captions quote a text; read them only."""
    folder = tmp_path_factory.mktemp("data") / "signs"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        sign([str(number)], side=64, size=14).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def clip(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it only."""
    return make_tiny_clip(tmp_path_factory.mktemp("towers") / "clip", tiny_model_dir / "tokenizer")


class Stopped(Exception):
    """What interrupts a probe here."""


def reading(patch: pytest.MonkeyPatch, until: int | None = None) -> list[np.ndarray]:
    """Everything reads "Open" from here on, the pictures that were read are listed; after so many it stops."""
    seen = list[np.ndarray]()

    def read(self: Reader, picture: np.ndarray) -> list[str]:
        if len(seen) == until:
            raise Stopped
        seen.append(picture)
        return ["Open"]

    patch.setattr(Reader, "read", read)
    return seen


@pytest.fixture(scope="module")
def done(
    run: Callable[..., Any], tiny_model_dir: Path, signs: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Any, list[np.ndarray]]:
    """A probe that was stopped while it read, and then run again."""
    out = tmp_path_factory.mktemp("probe") / "out"
    command = ["probe", tiny_model_dir, "--data", signs, "--features", clip, "--ocr", "--out", out, *SMALL, "--all"]
    with pytest.MonkeyPatch.context() as patch:
        measure_less(patch)
        reading(patch, until=3)
        with pytest.raises(Stopped):
            run(*command)
        assert not (out / "probe.json").exists()
        before = {path.name: path.stat().st_mtime_ns for path in (out / "sections").iterdir()}
        assert "letters.json" not in before
        patch.setattr(ProbeContext, "draw_batch", lambda *args: pytest.fail("drawn again"))
        seen = reading(patch)
        result = run(*command)
        assert result.code == 0, result.err
        for name, time in before.items():
            assert (out / "sections" / name).stat().st_mtime_ns == time
        patch.setattr(ProbeContext, "look", lambda *args: pytest.fail("measured again"))
        assert run(*command).code == 0
    return read_result(out), result, seen


def found(result: Result, name: str, **at: Any) -> Measure:
    one = result.find(name, **at)
    assert one is not None
    return one


def test_letters_are_measured_where_prompts_quote_a_text(done: tuple[Result, Any, list[np.ndarray]]) -> None:
    result, _, seen = done
    share = (1 + 4 / 9) / 2  # "OPEN" of OPEN, and of OPEN NOW 24
    for at in ({"guidance": 1.0}, {"guidance": 2.0}, {"steps": 1, "guidance": 3.0}, {"steps": 2, "guidance": 3.0}):
        one = found(result, "letters", **at)
        assert one.value == pytest.approx(share)
        assert one.low < one.value < one.high
        assert found(result, "letters_extra", **at).value == 0
    assert found(result, "held_out_letters").value == pytest.approx(share)
    assert len(seen) == 2 * (1 + 2 + 2)
    assert {picture.shape for picture in seen} == {(32, 32, 3)}
    kept = [one.at for one in result.pictures if one.purpose == "letters"]
    assert [(one["text"], one["read"], one["letters"]) for one in kept] == [
        ("OPEN", "Open", 1.0),
        ("OPEN NOW / 24", "Open", pytest.approx(4 / 9)),
    ]


def test_each_score_has_its_interval_and_its_text_in_the_table_by_unit(done: tuple[Result, Any, Any]) -> None:
    result, _, _ = done
    told = [dict(zip(COLUMNS, row, strict=True)) for row in rows([result])]
    read = [
        (row["text"], row["value"] != "") for row in told if (row["measure"], row["at"]) == ("letters", "guidance 1")
    ]
    assert sorted(read) == sorted((prompt, '"' in prompt or "“" in prompt) for prompt in result.names["prompts"])
    real = {row["text"] for row in told if row["measure"] == "held_out_letters" and row["value"]}
    assert real == {caption for caption in CAPTIONS if '"' in caption}
    cut = found(result, "agreement_cut", of="prompts")
    assert (cut.low, cut.high) == pytest.approx(wilson(cut.value * 3, 3))
    assert found(result, "letters", guidance=1.0).count == 2


def test_agreement_is_measured_by_guidance_and_steps(done: tuple[Result, Any, list[np.ndarray]]) -> None:
    result, _, _ = done
    for at in ({"guidance": 1.0}, {"guidance": 2.0}, {"steps": 1, "guidance": 3.0}, {"steps": 2, "guidance": 3.0}):
        one = found(result, "agreement", **at)
        assert one.unit == "cosine"
        assert one.low <= one.value <= one.high
        assert one.low < one.high
    assert -1 <= found(result, "held_out_agreement").value <= 1
    assert found(result, "best_guidance", by="agreement").value in (1, 2)
    assert found(result, "agreement_cut", of="prompts").value == 0
    assert found(result, "distance", guidance=1.0, kind="FD").value > 0


def test_table_json_and_page_have_them(done: tuple[Result, Any, list[np.ndarray]]) -> None:
    result, printed, _ = done
    for name in ("agreement", "letters", "held_out_letters"):
        assert name in printed.out
    assert result.folder is not None
    page = (result.folder / "index.html").read_text("utf-8")
    for text in ("Text in pictures", "asked for “OPEN NOW / 24”", "read “Open”", "44\u00a0% of letters", "cosine"):
        assert text in page
    assert "http" not in page.replace("http-equiv", "")
    kept = json.loads((result.folder / "probe.json").read_text())
    assert kept["settings"]["reader"].startswith("rapidocr ")


def test_what_cannot_be_read_is_refused_before_the_work(
    run: Callable[..., Any],
    tiny_model_dir: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, out = ["probe", tiny_model_dir, "--ocr", "--out", tmp_path / "out"], tmp_path / "out"
    done = run(*command, "--data", plain)
    assert done.code == 2
    assert f"error: --ocr: no caption in {plain} quotes a text; hint: write what is to be drawn in double" in done.err
    assert "error: --ocr: needs --data; hint" in run(*command).err
    assert "no such folder" in run(*command, "--data", tmp_path / "nowhere").err

    def missing() -> None:
        raise OptionError("needs rapidocr", "ocr", hint="pip install 'libreflux[ocr]'")

    monkeypatch.setattr(probe_options, "require_reader", missing)
    assert "--ocr: needs rapidocr; hint: pip install 'libreflux[ocr]'" in run(*command, "--data", plain).err
    assert not out.exists()


def test_fewer_than_two_quoted_texts_are_refused(
    run: Callable[..., Any], tiny_model_dir: Path, signs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "one"
    shutil.copytree(signs, folder)
    (folder / "1.txt").write_text("a sign that says nothing")
    monkeypatch.setattr(encode, "release", lambda device: None)
    done = run("probe", tiny_model_dir, "--data", folder, "--ocr", "--out", tmp_path / "out", *SMALL)
    assert done.code == 2
    assert "--ocr: fewer than two of the 3 captions that are measured in" in done.err

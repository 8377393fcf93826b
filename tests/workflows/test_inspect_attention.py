"""What a model looks at, by the command and from Python: its folder, its numbers, every text padding, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import libreflux
from libreflux.errors import LibrefluxError, RunError
from libreflux.probing.attention import TextLayout
from libreflux.probing.report import attention_page
from libreflux.workflows import drawing
from libreflux.workflows.inspect_attention import places_of
from libreflux.workflows.inspect_attention_files import AttentionFolder

SMALL: dict[str, Any] = {"steps": 2, "guidance": 1, "max_tokens": 24, "width": 32, "height": 48}
WORDS = ["--steps", 2, "--guidance", 1, "--max-tokens", 24, "--width", 32, "--height", 48]
PROMPT = "a red apple on blue"


def test_the_command_and_the_function_write_the_same(
    run: Callable[..., Any], tiny_model_dir: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under an adapter, with the padding of FLUX.1; the picture is the one that `generate` draws."""
    ours, theirs, drawn = tmp_path / "ours", tmp_path / "theirs", tmp_path / "drawn.png"
    adapter: dict[str, Any] = {"adapters": [f"{trained}:0.5"]}
    capfd.readouterr()
    found = libreflux.inspect_attention(str(tiny_model_dir), PROMPT, out=ours, tokens=["apple"], **adapter, **SMALL)
    assert capfd.readouterr().out == ""
    libreflux.generate(PROMPT, model=str(tiny_model_dir), out=drawn, **adapter, **SMALL)
    assert (ours / "01.png").read_bytes() == drawn.read_bytes()
    command = ["inspect", "attention", tiny_model_dir, PROMPT, "--token", "apple", "--adapter", f"{trained}:0.5"]
    done = run(*command, "--out", theirs, *WORDS)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [found.told, f"page: {theirs / 'index.html'}"]
    names = sorted(path.name for path in theirs.iterdir() if path.name != ".lock")
    assert names == sorted(path.name for path in ours.iterdir() if path.name != ".lock")
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    values = json.loads(found.file.read_text("utf-8"))
    assert values["schema"] == 1
    assert values["found"] == found.told
    assert values["settings"]["adapters"] == "adapter.safetensors:0.5"
    assert all((ours / name).is_file() for name in values["files"])
    # Written anew: what was there goes, and what somebody added stays.
    (theirs / "mine.txt").write_text("x")
    done = run(*command, "--out", theirs, *WORDS, "--no-causal", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["prompts"][0]["velocity_change"] == {}
    assert sorted(path.name for path in theirs.glob("*.*") if not path.name.startswith(".")) == [
        "01.png",
        "01.safetensors",
        "attention.json",
        "index.html",
        "mine.txt",
    ]


@pytest.mark.parametrize("padding", ["drop", "trim", "bias", "keep"])
def test_each_text_padding_is_recorded_as_it_is_drawn(tiny_model_dir: Path, tmp_path: Path, padding: str) -> None:
    prompts = [PROMPT, "a fox"]
    found = libreflux.inspect_attention(
        str(tiny_model_dir), prompts, text_padding=padding, out=tmp_path / "out", quantize="int8", **SMALL
    )
    assert [one.prompt for one in found.prompts] == prompts
    padded = padding in ("bias", "keep")
    for index, one in enumerate(found.prompts):
        assert len(one.layout.tokens) == (24 if padded else one.layout.own)
        assert (one.padding_share > 0) == padded
        assert ("padding_removed" in one.velocity) == padded
        assert ("padding_added" in one.velocity) != padded
        assert min(min(values) for values in one.velocity.values()) > 0
        assert one.velocity.keys() == one.pictures.keys()
        assert sum(one.readers["image"].values()) == pytest.approx(1, abs=1e-5)
        kept = load_file(tmp_path / "out" / f"{index + 1:02d}.safetensors")
        assert kept["on_text"].shape == (2, 3, 3, 2, len(one.layout.tokens))
        assert kept["where"].shape == (2, len(one.layout.tokens), 6)
    settings = json.loads(found.file.read_text("utf-8"))["settings"]
    assert settings["text padding"].startswith(padding)
    assert ("the model's own is drop" in settings["text padding"]) == (padding != "drop")


LAYOUT = TextLayout(("▁a", "▁el", "e", "phant", "▁on", "▁a", "</s>", "<pad>"), 7)


@pytest.mark.parametrize(
    ("word", "places"),
    [("a", [0, 5]), ("Elephant", [1, 2, 3]), ("elephant on", [1, 2, 3, 4]), ("7", [7]), ("8", []), ("ele", [1, 2])],
)
def test_a_word_is_found_in_its_tokens(word: str, places: list[int]) -> None:
    assert places_of(word, LAYOUT) == places


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--text-padding", "none"], "--text-padding: cannot be 'none'; hint: use one of drop, trim, bias, keep"),
        (["--token", "zebra"], "--token: no prompt has a token 'zebra'; hint: use a word of a prompt, or a number"),
        (["--token", ""], "--token: is empty"),
        (["--steps", "0"], "--steps"),
        (["--width", "40"], "--width: 40 is not a multiple of 16"),
        (["--max-tokens", "513"], "--max-tokens: cannot be 513; hint: use 1 to 512"),
        (["--negative", "red", "--guidance", "1"], "--negative: has no effect at guidance 1"),
        (["--offload-blocks", "x"], "--offload-blocks: cannot be 'x'"),
        ([PROMPT], "has a prompt twice"),
        (["--out", "full"], "full: is not empty (photo.png), and was not made by this command"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    run: Callable[..., Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"mine")
    done = run("inspect", "attention", tiny_model_dir, PROMPT, *words)
    assert done.code == 2
    [line] = done.err.splitlines()
    assert told in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "photo.png"]


def test_an_unknown_model_is_refused_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(LibrefluxError, match="nowhere"):
        libreflux.inspect_attention("nowhere", PROMPT, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_one(run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    done = run("inspect", "attention", tiny_model_dir, "", "--out", tmp_path / "out", *WORDS, "--no-causal")
    assert done.code == 0, done.err
    assert run("inspect", "attention", "", "a fox").err.startswith("libreflux: error: MODEL: is empty")


def test_blocks_are_never_compiled(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pictures on a card would be by themselves; what a compiled block computes cannot be watched."""
    opened: list[drawing.AdaptedSource] = []

    def noted(*args: Any, **named: Any) -> drawing.AdaptedSource:
        opened.append(open_for_drawing(*args, **named))
        return opened[0]

    open_for_drawing = drawing.open_for_drawing
    monkeypatch.setattr(drawing, "open_for_drawing", noted)
    with pytest.raises(LibrefluxError, match="no prompt has a token"):
        libreflux.inspect_attention(str(tiny_model_dir), PROMPT, tokens=["zebra"], out=tmp_path / "out", **SMALL)
    assert [one.compile for one in opened] == ["off"]


def test_a_changed_prompt_leaves_the_negative_prompt_as_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Even where both are the same text: it is the picture that `generate` draws of an empty prompt."""
    guided: dict[str, Any] = {**SMALL, "guidance": 3, "negative": PROMPT}
    libreflux.inspect_attention(str(tiny_model_dir), PROMPT, out=tmp_path / "out", **guided)
    libreflux.generate("", model=str(tiny_model_dir), out=tmp_path / "empty.png", **guided)
    changed, wanted = (Image.open(tmp_path / name) for name in ("out/01-prompt-emptied.png", "empty.png"))
    assert changed.tobytes() == wanted.tobytes()


def test_what_an_interrupted_inspection_left_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    def begun() -> AttentionFolder:
        folder = AttentionFolder(tmp_path / "out")
        folder.check_place()
        folder.out.mkdir(exist_ok=True)
        folder.begin()
        return folder

    folder = begun()
    folder.write("01.png", b"1")
    folder.write("02-padding-removed.png", b"2")
    (folder.out / "mine.png").write_bytes(b"mine")
    assert sorted(path.name for path in begun().out.glob("*.png")) == ["mine.png"]
    (folder.out / "01.png").write_bytes(b"mine too")
    with pytest.raises(RunError, match=r"is not empty \(01.png\), and was not made by this command"):
        begun()
    assert (folder.out / "01.png").read_bytes() == b"mine too"


def test_a_card_too_small_for_the_padded_prompts_is_told_in_one_line(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(drawing.AdaptedSource, "encoded", full)
    with pytest.raises(RunError, match="encoding the prompts on cpu: out of memory; hint: "):
        libreflux.inspect_attention(str(tiny_model_dir), PROMPT, out=tmp_path / "out", **SMALL)


def test_a_prompt_that_is_cut_keeps_its_end_token_and_has_upright_maps(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[attention_page.PromptShown] = []

    def noted(prompts: list[attention_page.PromptShown], **named: Any) -> str:
        shown.extend(prompts)
        return page(prompts, **named)

    page = attention_page.page
    monkeypatch.setattr(attention_page, "page", noted)
    short: dict[str, Any] = {**SMALL, "max_tokens": 3, "causal": False, "text_padding": "keep"}
    monkeypatch.chdir(tiny_model_dir)
    result = libreflux.inspect_attention(".", PROMPT, out=tmp_path / "out", **short)
    assert f"What does {tiny_model_dir.name} look at?" in result.page.read_text("utf-8")
    [found] = result.prompts
    assert (len(found.layout.tokens), found.layout.own, found.layout.tokens[-1]) == (3, 3, "</s>")
    assert found.padding_share == 0
    assert "padding" not in found.readers
    kept = load_file(tmp_path / "out" / "01.safetensors")["where"]
    assert sorted(shown[0].where) == [0, 1, 2]
    for place, where in shown[0].where.items():
        assert where.shape == (2, 48 // 16, 32 // 16)
        assert where.reshape(2, -1).tolist() == kept[:, place].tolist()

"""Tokenizers fitted to captions: transformers' own classes must load them and agree, id by id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from libreflux.emoji.build.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from libreflux.errors import ModelError

CAPTIONS = [
    "a red apple on blue",
    "a fox left of a rocket, on yellow",
    "apple, red, blue background, 3d icon",
    "A glossy teddy bear sits on the left; its fur is light-brown. The rocket's nose points up (see 2).",
    "",
]
STRANGE = ["zyxwvut", "Foxglove & Co.", "  two   spaces  ", "line\nbreak", "100% <b>", "naïve café", "日本", "🦊 fox"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    build_t5_tokenizer(CAPTIONS, root / "t5", 512)
    build_clip_tokenizer(CAPTIONS, root / "clip", 1024)
    return root / "t5", root / "clip"


@pytest.mark.parametrize("kind", ["T5Tokenizer", "T5TokenizerFast", "AutoTokenizer"])
def test_t5_reloads_with_equal_ids(folders: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    built = build_t5_tokenizer(CAPTIONS, tmp_path / "again", 512)
    loaded = getattr(transformers, kind).from_pretrained(folders[0])
    for text in CAPTIONS + STRANGE:
        assert loaded(text).input_ids == built(text).input_ids
    loaded.save_pretrained(tmp_path / "resaved")
    resaved = getattr(transformers, kind).from_pretrained(tmp_path / "resaved")
    assert [resaved(text).input_ids for text in STRANGE] == [built(text).input_ids for text in STRANGE]
    assert loaded.model_max_length == 512
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "CLIPTokenizerFast", "AutoTokenizer"])
def test_clip_reloads_with_equal_ids(folders: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    built = build_clip_tokenizer(CAPTIONS, tmp_path / "again", 1024)
    loaded = getattr(transformers, kind).from_pretrained(folders[1])
    for text in CAPTIONS + STRANGE:
        assert loaded(text).input_ids == built(text).input_ids
    assert loaded.model_max_length == 77
    size = len(json.loads((folders[1] / "tokenizer.json").read_text())["model"]["vocab"])
    assert loaded.bos_token_id == size - 2
    assert loaded.eos_token_id == loaded.pad_token_id == size - 1 == max(loaded.get_vocab().values())


def test_t5_known_captions_round_trip_word_by_word(folders: tuple[Path, Path]) -> None:
    tokenizer = transformers.T5Tokenizer.from_pretrained(folders[0])
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert ids[-1] == 1
        assert ids.count(1) == 1
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == caption.lower()
    assert tokenizer.convert_ids_to_tokens(tokenizer("A fox, left").input_ids) == ["▁a", "▁fox", ",", "▁left", "</s>"]


def test_clip_known_captions_round_trip(folders: tuple[Path, Path]) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders[1])
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(decoded.split()) == "".join(caption.lower().split())  # CLIP puts spaces around punctuation
    assert tokenizer.convert_ids_to_tokens(tokenizer("a fox, left").input_ids[1:-1]) == [
        "a</w>",
        "fox</w>",
        ",</w>",
        "left</w>",
    ]


def test_case_is_folded(folders: tuple[Path, Path]) -> None:
    for kind, folder in zip((transformers.T5Tokenizer, transformers.CLIPTokenizer), folders, strict=True):
        tokenizer = kind.from_pretrained(folder)
        assert tokenizer("A RED Apple").input_ids == tokenizer("a red apple").input_ids


def test_unknown_words_are_spelled(folders: tuple[Path, Path]) -> None:
    t5 = transformers.T5Tokenizer.from_pretrained(folders[0])
    assert t5.convert_ids_to_tokens(t5("zyx").input_ids) == ["▁", "z", "y", "x", "</s>"]
    assert 2 not in t5("zyxwvut 100% <b>").input_ids
    clip = transformers.CLIPTokenizer.from_pretrained(folders[1])
    for text in STRANGE:
        assert clip.eos_token_id not in clip(text).input_ids[1:-1]
    assert clip.convert_ids_to_tokens(clip("zyx").input_ids[1:-1]) == ["z", "y", "x</w>"]


def test_small_vocabularies(tmp_path: Path) -> None:
    small = build_t5_tokenizer(CAPTIONS, tmp_path / "t5", 80)
    assert len(small) <= 80
    assert 2 not in small(CAPTIONS[3]).input_ids
    assert small.decode(small(CAPTIONS[3]).input_ids, skip_special_tokens=True) == CAPTIONS[3].lower()
    assert len(build_clip_tokenizer(CAPTIONS, tmp_path / "clip", 520)) == 520
    with pytest.raises(ModelError, match="use at least"):
        build_t5_tokenizer(CAPTIONS, tmp_path / "none", 20)
    with pytest.raises(ModelError, match="514"):
        build_clip_tokenizer(CAPTIONS, tmp_path / "none", 300)

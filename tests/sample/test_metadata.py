"""PNGs that say how they were made."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from libreflux.errors import DataError
from libreflux.sample.metadata import (
    GenerationRecord,
    differences,
    open_png,
    png_bytes,
    read_record,
    save_png,
    versions,
)

ORIGIN = GenerationRecord(
    prompt="a red apple, ünïcödé 🍎\nsecond line",
    negative="blurry: yes",
    seed=2**40 + 1,
    steps=28,
    guidance=3.5,
    width=32,
    height=16,
    model="emoji-base",
    no_cfg_until=2,
    dtype="bfloat16",
    hashes={"transformer": "ab" * 32},
    versions={"libreflux": "0.1.0"},
)
IMAGE = Image.linear_gradient("L").convert("RGB").resize((32, 16))


def test_round_trip(tmp_path: Path) -> None:
    save_png(IMAGE, tmp_path / "deep" / "a.png", ORIGIN)
    assert read_record(tmp_path / "deep" / "a.png") == ORIGIN
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert isinstance(image, PngImageFile)
        assert image.tobytes() == IMAGE.tobytes()
        assert json.loads(image.text["libreflux"])["schema"] == 1
        assert image.text["parameters"].splitlines() == [
            "a red apple, ünïcödé 🍎",
            "second line",
            "Negative prompt: blurry: yes",
            "Steps: 28, Sampler: Euler, CFG scale: 3.5, Seed: 1099511627777, Size: 32x16, Model: emoji-base, "
            "No CFG until step: 2, Model hash: ababababab, Version: libreflux 0.1.0",
        ]


def test_the_text_says_what_is_not_as_usual() -> None:
    def said(**given: Any) -> str:
        return dataclasses.replace(ORIGIN, no_cfg_until=0, **given).parameters().splitlines()[-1]

    assert said() == said(guidance_start=0.0, guidance_stop=1.0, guidance_rescale=0.0, batch_cfg="auto", tile=None)
    every = said(guidance_start=0.25, guidance_stop=0.8, guidance_rescale=0.7, batch_cfg=True, tile=False)
    assert "CFG start: 0.25, CFG stop: 0.8, CFG rescale: 0.7, CFG in one pass: True, Tiled VAE: False" in every
    assert "Distilled CFG scale: 3.5" in said(embedded_guidance=3.5, guidance=1.0)
    texts = said(prompt_2='a "b", c', negative_2="", max_tokens=64, sigmas=[1.0, 0.25], quantize="int8")
    for part in (
        "Sigmas: 1 0.25",
        'Prompt 2: "a \\"b\\", c"',
        'Negative prompt 2: ""',
        "Max tokens: 64",
        "Quantized: int8",
    ):
        assert f", {part}, " in texts
    assert "CFG rescale" not in said(guidance=1.0, guidance_rescale=0.7)  # nothing was rescaled


SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""One `name: value` of the last line, as A1111's viewers and those made after it tell them apart."""


@pytest.mark.parametrize(
    "text",
    [
        "my model, v2: final",
        "C:\\models\\flux",
        'the "new" one',
        "two\nlines",
        "plain",
        "org/name@v1",
        "",
        " wide ",
        "é, ü",
        "a\\",
    ],
)
def test_every_free_text_is_read_back_as_one_value(text: str) -> None:
    """Names of models and adapters, and the second prompts: with commas, colons, quotes and lines in them."""
    adapters = [{"file": f"{text}.safetensors", "weight": 0.5}]
    record = dataclasses.replace(ORIGIN, model=text, adapters=adapters, prompt_2=text, negative_2=text, max_tokens=8)
    last = record.parameters().splitlines()[-1]
    found = {name: json.loads(value) if value[:1] == '"' else value for name, value in SETTING.findall(last)}
    assert {name: found[name] for name in ("Model", "Prompt 2", "Negative prompt 2", "Adapters")} == {
        "Model": text,
        "Prompt 2": text,
        "Negative prompt 2": text,
        "Adapters": f"{text}.safetensors:0.5",
    }
    assert (found["Steps"], found["Seed"], found["Max tokens"]) == ("28", "1099511627777", "8")
    assert len(found) == 13


def test_differences_are_named() -> None:
    adapter = {"file": "a.safetensors", "sha256": "cd" * 32, "weight": 0.5}
    was = dataclasses.replace(ORIGIN, adapters=[adapter], device="cpu, 2 threads")
    assert differences(was, dataclasses.replace(was, model="moved", seed=3)) == []
    now = dataclasses.replace(
        ORIGIN,
        adapters=[],
        hashes={"transformer": "ef" * 32},
        versions={"libreflux": "9", "torch": "2"},
        dtype="float32",
        device="cpu, 1 thread",
    )
    assert differences(was, now) == [
        f"the transformer's hash was {'ab' * 32}, is {'ef' * 32}",
        "adapter 1 was a.safetensors:0.5 cdcdcdcdcd, is none",
        "libreflux was 0.1.0, is 9",
        "torch was none, is 2",
        "the dtype was bfloat16, is float32",
        "the device was cpu, 2 threads, is cpu, 1 thread",
    ]


def test_equal_inputs_give_equal_bytes() -> None:
    assert png_bytes(IMAGE, ORIGIN) == png_bytes(IMAGE.copy(), ORIGIN)
    assert png_bytes(IMAGE, ORIGIN) != png_bytes(IMAGE, GenerationRecord(**{**vars(ORIGIN), "seed": 1}))
    assert {"libreflux", "torch", "diffusers"} <= versions().keys()


def test_pictures_of_others_are_refused(tmp_path: Path) -> None:
    plain, text, newer, damaged = (tmp_path / name for name in ("plain.png", "text.png", "newer.png", "damaged.png"))
    IMAGE.save(plain)
    with pytest.raises(DataError, match="says nothing of how it was made"):
        read_record(plain)
    text.write_text("hello")
    with pytest.raises(DataError, match="not a readable picture"):
        read_record(text)
    with pytest.raises(DataError, match="no such picture; hint: check the path"):
        read_record(tmp_path / "missing.png")
    save_png(IMAGE, newer, GenerationRecord(**{**vars(ORIGIN), "schema": 2}))
    with pytest.raises(DataError, match="schema 2 is not 1; hint: update"):
        read_record(newer)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("libreflux", '{"schema": 1, "colour": 3}')
    IMAGE.save(damaged, pnginfo=info)
    with pytest.raises(DataError, match="says colour, which this version does not know; hint: update"):
        read_record(damaged)
    wrong = PngInfo()
    wrong.add_text("libreflux", json.dumps({**vars(ORIGIN), "steps": "many"}))
    IMAGE.save(damaged, pnginfo=wrong)
    with pytest.raises(DataError, match=r"damaged record .*steps"):
        read_record(damaged)


def test_a_guidance_between_0_and_1_is_followed_but_for_pictures_of_then(tmp_path: Path) -> None:
    weak = dataclasses.replace(ORIGIN, guidance=0.5)
    save_png(IMAGE, tmp_path / "new.png", weak)
    new = read_record(tmp_path / "new.png")
    assert (new, new.scale, new.passes) == (weak, 0.5, 56)
    told = json.loads(open_png(tmp_path / "new.png").info["libreflux"])
    assert told.pop("below_one") is True
    with Image.open(tmp_path / "new.png") as image:
        info = PngInfo()
        info.add_text("libreflux", json.dumps(told))
        image.save(tmp_path / "old.png", pnginfo=info)
    old = read_record(tmp_path / "old.png")
    assert (old.guidance, old.scale, old.passes) == (0.5, 1.0, 28)
    save_png(IMAGE, tmp_path / "again.png", old)
    assert read_record(tmp_path / "again.png") == old
    for scale in (0.0, 1.0):
        plain = dataclasses.replace(ORIGIN, guidance=scale)
        assert (plain.scale, plain.passes) == (1.0, 28)
        assert b"below_one" not in png_bytes(IMAGE, plain)

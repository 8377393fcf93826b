"""PNGs that say how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from libreflux.errors import DataError
from libreflux.sample.metadata import Origin, png_bytes, read_origin, save_png, versions

ORIGIN = Origin(
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
    assert read_origin(tmp_path / "deep" / "a.png") == ORIGIN
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.tobytes() == IMAGE.tobytes()
        assert json.loads(image.text["libreflux"])["schema"] == 1
        assert image.text["parameters"].splitlines() == [
            "a red apple, ünïcödé 🍎",
            "second line",
            "Negative prompt: blurry: yes",
            "Steps: 28, Sampler: Euler, CFG scale: 3.5, Seed: 1099511627777, Size: 32x16, Model: emoji-base, "
            "Model hash: ababababab, Version: libreflux 0.1.0",
        ]


def test_equal_inputs_give_equal_bytes() -> None:
    assert png_bytes(IMAGE, ORIGIN) == png_bytes(IMAGE.copy(), ORIGIN)
    assert png_bytes(IMAGE, ORIGIN) != png_bytes(IMAGE, Origin(**{**vars(ORIGIN), "seed": 1}))
    assert {"libreflux", "torch", "diffusers"} <= versions().keys()


def test_pictures_of_others_are_refused(tmp_path: Path) -> None:
    plain, text, newer, damaged = (tmp_path / name for name in ("plain.png", "text.png", "newer.png", "damaged.png"))
    IMAGE.save(plain)
    with pytest.raises(DataError, match="says nothing of how it was made"):
        read_origin(plain)
    text.write_text("hello")
    with pytest.raises(DataError, match="not a readable picture"):
        read_origin(text)
    with pytest.raises(DataError, match="not a readable picture"):
        read_origin(tmp_path / "missing.png")
    save_png(IMAGE, newer, Origin(**{**vars(ORIGIN), "schema": 2}))
    with pytest.raises(DataError, match="schema 2 is not 1; mend: update"):
        read_origin(newer)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("libreflux", '{"schema": 1, "colour": 3}')
    IMAGE.save(damaged, pnginfo=info)
    with pytest.raises(DataError, match="damaged origin"):
        read_origin(damaged)

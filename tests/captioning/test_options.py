"""Options that make no sense are refused before anybody is asked and anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import libreflux
from libreflux.errors import LibrefluxError
from served import says, serving


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dtype": "bf16"}, "dtype: has no effect"),
        ({"quantize": "int8"}, "quantize: has no effect"),
        ({"device": "cpu"}, "device: has no effect"),
        ({"captions": []}, "captions: is empty"),
        ({"captions": ["poem"]}, "captions: no prompt is known for 'poem'"),
        ({"captions": ["short", "short=S"]}, "captions: short is there twice"),
        ({"captions": ["mood="]}, "captions: mood has no prompt"),
        ({"captions": ["a b=c"]}, "captions: 'a b' is no name"),
        ({"existing": "replace"}, "existing: cannot be 'replace'"),
        ({"temperature": float("nan")}, "temperature: cannot be nan"),
        ({"tries": 0}, "tries: cannot be 0"),
        ({"side": 8}, "side: cannot be 8"),
        ({"shard": "3/2"}, "shard: '3/2' is no part"),
        ({"timeout": 0}, "timeout: cannot be 0"),
        ({"page": "photos/a.png"}, "page: 'photos/a.png' is no page"),
    ],
)
def test_what_makes_no_sense_is_refused_first(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    with serving(lambda asked, number: says("a fox")) as served, pytest.raises(LibrefluxError) as error:
        libreflux.caption(photos, endpoint=served.url, **given)
    assert told in str(error.value)
    assert not served.asked
    assert not os.path.lexists(photos / ".caption")

"""What belongs together stays together, whatever happens to the files."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from caching import prepare
from libreflux.data import encode
from libreflux.data.batches import Batches, Encode
from libreflux.data.cache import CacheWriter
from libreflux.data.crops import View, cut, views
from libreflux.data.order import step_plan, steps_of_epoch
from libreflux.data.pictures import load_rgb
from libreflux.data.quarantine import report_quarantine
from libreflux.data.sources import Quarantined
from libreflux.errors import DataError
from libreflux.model import latents
from libreflux.model.opening import open_model
from libreflux.model.text import TextConditioning
from libreflux.recipe import DataSource
from tiny import DECIDING, UNDECIDING

SQUARE = View("square", 32)


def run(model: Path, data: Path, out: Path, **changed: Any) -> Batches:
    shown = changed.pop("views", [SQUARE])
    sources = changed.pop("sources", [DataSource(path=str(data), caption_dropout=0.0)])
    cache, found = prepare(str(model), sources, out=out, views=shown, text_padding="drop", **changed)
    return Batches(cache, found, views=shown, seed=0)


def brightness(value: int, path: Path, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    path.with_suffix(".txt").write_text(f"grey {value}\n")


def test_shuffled_deleted_renamed_and_replaced_pictures_keep_their_captions(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "cache"
    vae = open_model(tiny_model_dir).load_vae()

    def check(values: set[int]) -> None:
        batches = run(tiny_model_dir, data, out)
        batch = batches.batch(step_plan(0, 0, batches.samples, 1, 100, 1)[0])
        assert set(batch.captions) == {f"grey {value}" for value in values}
        assert len(batch) == len(values)
        for latent, caption in zip(batch.latents, batch.captions, strict=True):
            pixels = torch.full((1, 3, 32, 32), int(caption.split()[1]) / 127.5 - 1)
            torch.testing.assert_close(latent, latents.encode(vae, pixels)[0], rtol=0, atol=1e-5)

    for number in range(6):
        brightness(40 * number, data / f"{number}.png")
    check({0, 40, 80, 120, 160, 200})
    for number in range(6):  # every name goes to another picture
        for suffix in ("png", "txt"):
            (data / f"{number}.{suffix}").rename(data / f"new-{(number * 5 + 2) % 6}.{suffix}")
    check({0, 40, 80, 120, 160, 200})
    (data / "new-3.png").unlink()
    gone = int((data / "new-3.txt").read_text().split()[1])
    (data / "new-3.txt").unlink()
    brightness(250, data / "deep" / "0.png")
    check({0, 40, 80, 120, 160, 200, 250} - {gone})
    brightness(30, data / "new-0.png")  # other pixels and another caption under a known name
    check({int(path.read_text().split()[1]) for path in data.rglob("*.txt")})


def test_a_cache_is_of_its_encoders_and_settings_whatever_else_changes(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "release", lambda device: None)  # it collects garbage, which takes long
    model, data, out = tmp_path / "model", tmp_path / "data", tmp_path / "cache"
    shutil.copytree(tiny_model_dir, model)
    brightness(100, data / "a.png")
    written: list[str] = []
    for name in ("add_latents", "add_texts"):
        real = getattr(CacheWriter, name)

        def counted(*args: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            written.append(name)
            return real(*args)

        monkeypatch.setattr(CacheWriter, name, counted)

    def made(**changed: Any) -> list[str]:
        written.clear()
        run(model, data, out, **changed)
        return written.copy()

    assert made() == ["add_latents", "add_texts"]
    assert made() == []
    for name in ("transformer", "transformer's configuration", "shift", "padding"):  # the recipe's is what counts
        DECIDING[name](model)
        assert made() == [], name
    for name, change in UNDECIDING.items():
        change(model)
        assert made() == [], name
    model, data = model.rename(tmp_path / "another model"), data.rename(tmp_path / "other data")
    assert made() == []
    for name in ("VAE", "VAE's configuration", "CLIP", "T5", "tokenizer"):
        DECIDING[name](model)
        with pytest.raises(DataError, match=r"this cache was made with (vae|text_encoders) \w+…, now"):
            made()
        shutil.rmtree(out)
        assert made() == ["add_latents", "add_texts"], name
    for changed, told in (
        ({"max_tokens": 8}, "max_tokens 512, now 8"),
        ({"latents": "sample"}, "latents float32, now float32 mean and std"),
        ({"text_cache": "int8"}, "text bfloat16, now int8"),
        ({"text_precision": "bf16"}, "text_precision float32, now bfloat16"),
    ):
        with pytest.raises(DataError, match=told):
            made(**changed)
    assert made(views=[View("square", 48)]) == ["add_latents"]
    (data / "a.txt").write_text("another grey")
    assert made() == ["add_texts"]
    brightness(101, data / "a.png")
    (data / "a.txt").write_text("another grey")
    assert made() == ["add_latents"]


def original_cached_text(cache: dict[str, TextConditioning], caption: str, encode: Encode) -> TextConditioning:
    """A text cache keyed by the prompt alone: what was encoded first is served whatever is asked for now."""
    if caption not in cache:
        cache[caption] = encode([caption])
    return cache[caption]


@pytest.mark.parametrize(("key", "values"), [("max_tokens", (8, 512)), ("padding", ("drop", "trim"))])
def test_text_is_never_served_under_other_settings_as_by_a_prompt_only_key(
    tmp_path: Path, tiny_model_dir: Path, key: str, values: tuple[Any, Any]
) -> None:
    caption = "a small green frog " * 5
    brightness(100, tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text(caption)

    def prepared(out: Path, value: Any) -> TextConditioning:
        model = tmp_path / f"model-{value}"
        shutil.copytree(tiny_model_dir, model, dirs_exist_ok=True)
        facts = json.loads((model / "libreflux.json").read_text())
        if key == "max_tokens":
            (model / "libreflux.json").write_text(json.dumps(facts | {"max_tokens": value}))
        padding = value if key == "padding" else "drop"
        source = DataSource(path=str(tmp_path / "data"))
        return prepare(str(model), [source], views=[SQUARE], text_padding=padding, out=out)[0].text([caption.strip()])

    first, fresh = prepared(tmp_path / "one", values[0]), prepared(tmp_path / "two", values[1])
    with pytest.raises(DataError, match=f"{key} {values[0]}, now {values[1]}"):
        prepared(tmp_path / "one", values[1])
    encoders = open_model(tiny_model_dir).load_text()
    known: dict[str, TextConditioning] = {}
    for value, wanted in zip(values, (first, fresh), strict=True):
        settings: dict[str, Any] = {"padding": "drop", "max_tokens": 512} | {key: value}
        served = original_cached_text(known, caption.strip(), functools.partial(encoders.encode, **settings))
        right = served.lengths == wanted.lengths
        right = right and torch.allclose(served.tokens[0], wanted.tokens[0].float(), rtol=2**-7, atol=1e-3)
        assert right == (value == values[0])  # the second time it is the first one's again


def test_aspect_batches_are_of_one_size_and_all_views_are_shown(tmp_path: Path, tiny_model_dir: Path) -> None:
    sizes = [(60, 30), (30, 60), (64, 32), (32, 32), (90, 45), (40, 41)]
    for number, size in enumerate(sizes):
        brightness(40 * number, tmp_path / "data" / f"{number}.png", size)
    shown = views(["square", "aspect"], [32, 48])
    batches = run(tiny_model_dir, tmp_path / "data", tmp_path / "cache", views=shown)
    assert len(batches) == 6 * 4
    seen = []
    for step in range(steps_of_epoch(0, batches.samples, 1, 4, 1)):
        [unit] = step_plan(0, step, batches.samples, 1, 4, 1)
        batch = batches.batch(unit)
        seen += [(name, tuple(latent.shape[-2:])) for name, latent in zip(batch.sample_ids, batch.latents, strict=True)]
    assert len(seen) == len(batches)
    expected = [tuple(side // 8 for side in view.size(*size)[::-1]) for size in sizes for view in shown]
    assert sorted(shape for _, shape in seen) == sorted(expected)
    assert len(set(expected)) >= 5


def test_sources_have_rates_weights_and_prefixes_of_their_own(tmp_path: Path, tiny_model_dir: Path) -> None:
    for number in range(4):
        brightness(40 * number, tmp_path / "often" / ("2_x" if number else ".") / f"{number}.png")
        brightness(40 * number + 20, tmp_path / "seldom" / f"{number}.png")
    sources = [
        DataSource(path=str(tmp_path / "often"), weight=1.5, prefix="o ", caption_dropout=0, loss_weight=3),
        DataSource(path=str(tmp_path / "seldom"), weight=0.5, caption_dropout=1, loss_weight=0.25),
    ]
    batches = run(tiny_model_dir, tmp_path, tmp_path / "cache", sources=sources)
    counts = dict.fromkeys(range(8), 0)
    for step in range(sum(steps_of_epoch(epoch, batches.samples, 1, 3, 1) for epoch in range(4))):
        [unit] = step_plan(0, step, batches.samples, 1, 3, 1)
        batch = batches.batch(unit)
        for item, caption, weight in zip(unit.items, batch.captions, batch.loss_weights.tolist(), strict=True):
            counts[item] += 1
            assert (weight, caption[:6]) == ((3.0, "o grey") if item < 4 else (0.25, ""))
    assert sorted(counts[item] for item in range(4)) == [6, 12, 12, 12]  # 1.5 and 2 x 1.5, over four epochs
    assert [counts[item] for item in range(4, 8)] == [2, 2, 2, 2]


def test_unusable_pictures_are_left_out_listed_and_come_back_repaired(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = tmp_path / "data", tmp_path / "cache"
    for number in range(4):
        brightness(40 * number, data / f"{number}.png")
    whole = (data / "1.png").read_bytes()
    (data / "1.png").write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"1\.png: unreadable picture \(.*\); hint: repair it, remove it, or raise max"):
        run(tiny_model_dir, data, out)
    assert not out.exists()
    with caplog.at_level(logging.WARNING):
        batches = run(tiny_model_dir, data, out, max_quarantined=0.25)
    assert len(batches) == 3
    assert f"1 of 4 pictures cannot be used and are left out, see {out / 'quarantine.jsonl'}" in caplog.text
    [row] = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert row["path"] == str(data / "1.png")
    assert row["reason"].startswith("unreadable picture (")
    (data / "1.png").write_bytes(whole)
    assert len(run(tiny_model_dir, data, out, max_quarantined=0.25)) == 4
    assert (out / "quarantine.jsonl").read_text() == ""


def test_more_unusable_pictures_than_allowed_stop_the_run_in_one_line(tmp_path: Path) -> None:
    bad = [Quarantined(f"{n}", Path(f"{n}.png"), "unreadable picture (cut)") for n in range(3)]
    report_quarantine(tmp_path / "fine", bad, 147, 0.02)
    assert len((tmp_path / "fine" / "quarantine.jsonl").read_text().splitlines()) == 3
    with pytest.raises(DataError) as caught:
        report_quarantine(tmp_path / "over", bad, 146, 0.02)
    told = str(caught.value)
    assert told.startswith("0.png: 3 of 149 pictures cannot be used, the first: unreadable picture (cut); hint: ")
    assert str(tmp_path / "over" / "quarantine.jsonl") in told
    assert len((tmp_path / "over" / "quarantine.jsonl").read_text().splitlines()) == 3
    with pytest.raises(DataError):
        report_quarantine(tmp_path / "all", bad, 0, 1.0)


def test_background_crop_and_view_never_share_a_cached_crop(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text("noise\n")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    sources = [
        DataSource(path=str(tmp_path / name), background=colour, crops_per_picture=2)
        for name, colour in (("data", "white"), ("copy", "black"))
    ]
    shown = views(["square", "aspect"], [64])
    batches = run(tiny_model_dir, tmp_path, tmp_path / "cache", sources=sources, views=shown)
    vae = open_model(tiny_model_dir).load_vae()
    name = batches.batch(step_plan(0, 0, batches.samples, 1, 1, 1)[0]).sample_ids[0]
    found = []
    for colour in ("white", "black"):
        for view in shown:
            for index in range(2):
                crop = torch.tensor(cut(load_rgb(tmp_path / "data" / "a.png", colour), view, index, name))
                expected = latents.encode(vae, rearrange(crop, "h w c -> 1 c h w") / 127.5 - 1)[0]
                stored = batches.cache.latents(name, view.name(index, colour))
                torch.testing.assert_close(stored, expected, rtol=0, atol=1e-5)
                found.append(stored.flatten()[:64])
    assert len({tuple(each.tolist()) for each in found}) == 8

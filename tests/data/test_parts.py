"""A cache made in parts, on a disk too small, without text, or of another version."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from libreflux.data import disk, encode
from libreflux.data.batches import Batches
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.index import latents_key, text_key
from libreflux.data.order import step_plan
from libreflux.data.prepare import _online, prepare
from libreflux.data.sources import Sample
from libreflux.errors import DataError
from libreflux.recipe import DataSource, load_recipe

SQUARE = View("square", 32)
Prepared = tuple[Cache, list[tuple[DataSource, list[Sample]]]]


def run(model: Path, data: Path, out: Path, **changed: Any) -> Prepared:
    source = DataSource(path=str(data), crops_per_picture=2)
    return prepare(str(model), [source], out=out, views=[SQUARE], text_padding="drop", **changed)


def test_parts_are_read_as_one_cache_equal_to_an_undivided_one(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sources = prepared
    out = tmp_path / "cache"
    seen: list[str] = []
    for number in (2, 0, 1):
        _, [(_, samples)] = run(tiny_model_dir, pictures, out, part=(number, 3))
        seen += [sample.id for sample in samples]
    assert sorted(path.name for path in (out / "parts").iterdir()) == ["0000-of-0003", "0001-of-0003", "0002-of-0003"]
    assert sorted(seen) == sorted(sample.id for sample in sources[0][1])
    monkeypatch.setattr(encode, "load_rgb", None)  # nothing is left to encode
    cache, again = run(tiny_model_dir, pictures, out)
    assert not (out / "index.sqlite3").exists()
    one, other = (Batches(each, again, views=[SQUARE], seed=0) for each in (whole, cache))
    assert one.fingerprint() == other.fingerprint()
    for unit in step_plan(0, 0, one.samples, 1, 4, 2):
        a, b = one.batch(unit), other.batch(unit)
        assert (a.sample_ids, a.captions) == (b.sample_ids, b.captions)
        assert torch.equal(a.latents, b.latents)
        assert all(torch.equal(x, y) for x, y in zip(a.text.tokens, b.text.tokens, strict=True))
    shutil.rmtree(out / "parts" / "0001-of-0003")
    with pytest.raises(DataError, match="not in the cache; mend: run"):
        Batches(Cache(out), again, views=[SQUARE], seed=0)


def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, [(_, samples)] = prepared
    texts = ["", *{caption for sample in samples for caption in sample.captions}]
    latents, text = disk.needed_bytes(tiny_model_dir, [(32, 32)] * 14, texts, 512)
    for kind, estimate in (("latents", latents), ("texts", text)):
        stored = sum(path.stat().st_size for path in (cache.folder / "shards").glob(f"{kind}-*"))
        assert 0.7 < estimate / stored < 1.5
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    with pytest.raises(DataError, match=r"needs 0\.0\d+ MB \(latents .*, text .*\); 0\.03 MB free; mend: free some"):
        run(tiny_model_dir, pictures, tmp_path / "out" / "cache")
    assert not (tmp_path / "out").exists()


def test_without_a_text_cache_lengths_are_known_and_captions_encoded_when_read(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path
) -> None:
    full, sources = prepared
    out = tmp_path / "cache"
    cache, _ = run(tiny_model_dir, pictures, out, text_cache="none", prompts=["a fox"])
    captions = sorted({caption for sample in sources[0][1] for caption in sample.captions})
    keys = [text_key(caption) for caption in captions]
    assert cache.token_counts(keys).tolist() == full.token_counts(keys).tolist() == full.text(captions).lengths
    assert not cache.stored_texts(keys).any()
    assert cache.stored_texts([text_key(""), text_key("a fox")]).all()
    with pytest.raises(DataError, match="is not here"):
        cache.text(captions[:1])
    values = [f"model={tiny_model_dir}", f"data.0.path={pictures}", "resolution=32", "steps=1", f"out={tmp_path}"]
    online = Batches(cache, sources, views=[SQUARE], seed=0, encode=_online(load_recipe(None, values), cache, "cpu"))
    cached = Batches(full, sources, views=[SQUARE], seed=0)
    assert online.fingerprint() == cached.fingerprint()
    [unit] = step_plan(0, 0, cached.samples, 1, 7, 1)
    a, b = online.batch(unit), cached.batch(unit)
    assert a.captions == b.captions
    for x, y in zip(a.text.tokens, b.text.tokens, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=2**-7, atol=1e-3)
    again, _ = run(tiny_model_dir, pictures, out)  # the text may be added later
    assert again.stored_texts(keys).all()
    assert again.sizes([latents_key(sources[0][1][0].id, SQUARE.name(1, "white"))]).tolist() == [[4, 4]]


def test_a_cache_of_the_first_version_is_refused_by_its_number(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path
) -> None:
    index = sqlite3.connect(tmp_path / "index.sqlite3")
    index.execute("CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
    index.execute("INSERT INTO settings VALUES ('schema', '1')")
    index.commit()
    index.close()
    for use in (lambda: Cache(tmp_path), lambda: run(tiny_model_dir, pictures, tmp_path)):
        with pytest.raises(DataError, match="a cache of schema 1; this version reads 2; mend: remove this cache"):
            use()

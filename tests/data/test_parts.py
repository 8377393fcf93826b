"""A cache made in parts, on a disk too small, without text, or of another version."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from caching import prepare
from libreflux import files
from libreflux.data import encode, forecast, index
from libreflux.data.batches import Batches
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.index import latents_key, text_key
from libreflux.data.order import step_plan
from libreflux.data.prepare import encode_online
from libreflux.data.sources import Sample
from libreflux.errors import DataError, RunError
from libreflux.model.opening import open_model
from libreflux.recipe import DataSource

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
    with pytest.raises(DataError, match="not in the cache; hint: run"):
        Batches(Cache(out), again, views=[SQUARE], seed=0)


def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, [(_, samples)] = prepared
    texts = ["", *{caption for sample in samples for caption in sample.captions}]
    latents, text = forecast.needed_bytes(tiny_model_dir, [(32, 32)] * 14, texts, 512)
    for kind, estimate in (("latents", latents), ("texts", text)):
        stored = sum(path.stat().st_size for path in (cache.folder / "shards").glob(f"{kind}-*"))
        assert 0.7 < estimate / stored < 1.5
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    with pytest.raises(
        DataError, match=r"needs 0\.0\d+ MB \(latents .*, text .*\) and 67\.1 MB to spare; 0\.03 MB free; hint: free"
    ):
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
    online = Batches(
        cache, sources, views=[SQUARE], seed=0, encode=encode_online(open_model(tiny_model_dir), cache, "cpu")
    )
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
        with pytest.raises(DataError, match="a cache of schema 1; this version reads 2; hint: remove this cache"):
            use()


@pytest.fixture(scope="module")
def three_parts(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, pictures: Path) -> Path:
    """Those pictures in three parts; copy it."""
    out = tmp_path_factory.mktemp("three") / "cache"
    for number in range(3):
        run(tiny_model_dir, pictures, out, part=(number, 3))
    return out


def lose(three_parts: Path, out: Path) -> Path:
    """Copies a cache in three parts but for one shard of latents, whose path is returned."""
    shutil.copytree(three_parts, out)
    lost = min((out / "parts" / "0001-of-0003").rglob("latents-*.safetensors"))
    lost.unlink()
    with pytest.raises(DataError, match="missing or cut short; hint: run `libreflux prepare` again"):
        Cache(out)
    return lost


@pytest.mark.parametrize("divisions", [[(0, 1)], [(1, 2), (0, 2)], [(1, 3)]])
def test_a_lost_shard_of_a_part_is_made_again_under_any_division(
    tmp_path: Path,
    prepared: Prepared,
    three_parts: Path,
    tiny_model_dir: Path,
    pictures: Path,
    divisions: list[tuple[int, int]],
) -> None:
    whole, [(_, samples)] = prepared
    out = tmp_path / "cache"
    lose(three_parts, out)
    for part in divisions:
        run(tiny_model_dir, pictures, out, part=part)
    cache = Cache(out)
    for sample in samples:
        for number in range(2):
            name = SQUARE.name(number, "white")
            torch.testing.assert_close(cache.latents(sample.id, name), whole.latents(sample.id, name))


def test_a_lost_part_is_left_to_its_own_process(
    tmp_path: Path, three_parts: Path, tiny_model_dir: Path, pictures: Path
) -> None:
    out = tmp_path / "cache"
    lost = lose(three_parts, out)
    run(tiny_model_dir, pictures, out, part=(0, 3))  # its neighbour may be about to write
    assert lost.name in index_names(lost.parents[1])
    with files.lock(lost.parents[1]):
        run(tiny_model_dir, pictures, out, part=(0, 2))
        with pytest.raises(RunError, match="in use by process"):
            run(tiny_model_dir, pictures, out)
    run(tiny_model_dir, pictures, out)
    assert lost.name not in index_names(lost.parents[1])


def index_names(folder: Path) -> set[str]:
    with index.connect(folder) as opened:
        return {name for (name,) in opened.execute("SELECT name FROM shards")}


def test_a_lost_shard_that_nothing_needs_any_more_is_forgotten(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path
) -> None:
    out, fewer = tmp_path / "cache", tmp_path / "fewer"
    shutil.copytree(prepared[0].folder, out)
    shutil.copytree(pictures, fewer)
    for sample in prepared[1][0][1][:4]:  # those of the first shard of latents
        (fewer / sample.path.name).unlink()
    kept = [line for line in (fewer / "metadata.jsonl").read_text().splitlines() if (fewer / line[15:22]).exists()]
    (fewer / "metadata.jsonl").write_text("\n".join(kept))
    (out / "shards" / "latents-00000000.safetensors").unlink()
    cache, [(_, samples)] = run(tiny_model_dir, fewer, out)
    assert len(samples) == 3
    assert Cache(out).settings == cache.settings


def test_a_shard_that_is_committed_while_another_process_reads_is_not_missing(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared[0].folder, tmp_path / "cache")
    folder = tmp_path / "cache"

    class Busy:
        """An index into which another process commits a shard just before each query."""

        def __init__(self, opened: sqlite3.Connection) -> None:
            self.opened, self.added = opened, 0

        def execute(self, query: str) -> sqlite3.Cursor:
            self.added += 1
            name = f"texts-1000000{self.added}.safetensors"
            (folder / "shards" / name).write_bytes(b"x")
            with index.connect(folder) as other:
                other.execute("INSERT INTO shards (name, size) VALUES (?, 1)", (name,))
            return self.opened.execute(query)

    with index.connect(folder) as opened:
        busy = Busy(opened)
        assert index.damaged_shards(folder, busy) == {}  # type: ignore[arg-type]
        assert busy.added == 1

    def while_another_deletes(*arguments: Any) -> Any:
        with closing(sqlite3.connect(folder / index.INDEX, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("DELETE FROM shards")
            with pytest.raises(sqlite3.OperationalError, match="locked"):  # the rows of both tables are of one moment
                other.execute("COMMIT")
        return read_rows(*arguments)

    read_rows = index.read_rows
    monkeypatch.setattr(index, "read_rows", while_another_deletes)
    assert len(Cache(folder).settings) == len(prepared[0].settings)

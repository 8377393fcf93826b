"""Single bits flipped in every file of a cache, files cut short or overwritten: named or repaired, never other data."""

from __future__ import annotations

import logging
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caching import prepare
from libreflux.data import encode, shards
from libreflux.data import prepare as preparing
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.index import latents_key, text_key
from libreflux.data.sources import Sample
from libreflux.errors import DataError, LibrefluxError
from libreflux.recipe import DataSource
from rights import bound_by_modes

SQUARE = View("square", 32)
NAMES = [SQUARE.name(index, "white") for index in range(2)]
Prepared = tuple[Cache, list[tuple[DataSource, list[Sample]]]]


@pytest.fixture
def again(prepared: Prepared, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Prepared]:
    """Prepares a copy of the cache again, as it was made."""
    monkeypatch.setattr(encode, "SHARD_ITEMS", 4)
    [(source, _)] = prepared[1]
    return lambda out, **more: prepare(
        str(tiny_model_dir), [source], views=[SQUARE], text_padding="drop", out=out, **more
    )


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every crop and text that is encoded from here on."""
    items: list[Any] = []
    for name in ("encode_crops", "encode_texts"):

        def counted(wanted: list[Any], *rest: Any, then: Callable[..., None] = getattr(preparing, name)) -> None:
            items.extend(wanted)
            then(wanted, *rest)

        monkeypatch.setattr(preparing, name, counted)
    return items


def contents(cache: Cache, samples: list[Sample]) -> dict[str, Tensor]:
    """All that training reads of these samples."""
    crops = [(sample.id, name) for sample in samples for name in NAMES]
    captions = sorted({caption for sample in samples for caption in sample.captions} | {""})
    text = cache.text(captions)
    found = {f"{picture}/{crop}": cache.latents(picture, crop) for picture, crop in crops}
    found |= dict(zip(captions, text.tokens, strict=True))
    sizes = cache.sizes([latents_key(*crop) for crop in crops])
    counts = cache.token_counts([text_key(caption) for caption in captions])
    return found | {"/pooled": text.pooled, "/sizes": torch.tensor(sizes), "/counts": torch.tensor(counts)}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def flips(file: Path, count: int) -> list[tuple[int, int]]:
    """Bits of a file, (byte, bit): its start, and others at random among the bytes that are not zero."""
    drawn, data = random.Random(file.name), file.read_bytes()
    used = [at for at, byte in enumerate(data) if byte]
    return [(at, at % 8) for at in (0, 3, 9, 20)] + [(drawn.choice(used), drawn.randrange(8)) for _ in range(count)]


def flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def copied(prepared: Prepared, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(prepared[0].folder, out))


def test_a_flipped_bit_of_any_shard_is_named_when_it_is_read(tmp_path: Path, prepared: Prepared) -> None:
    samples = prepared[1][0][1]
    wanted, out = contents(prepared[0], samples), copied(prepared, tmp_path / "cache")
    found = sorted((out / "shards").glob("*.safetensors"))
    assert {shard.name.partition("-")[0] for shard in found} == {"latents", "texts"}
    assert len(found) > 4
    for shard in found:
        whole, told = shard.read_bytes(), rf"{shard.name}: damaged shard .*; hint: run `libreflux prepare` again"
        for place in flips(shard, 10):
            flip(shard, *place)
            with pytest.raises(DataError, match=told):
                contents(Cache(out), samples)
            shard.write_bytes(whole)
    assert_alike(contents(Cache(out), samples), wanted)


def test_a_flipped_bit_of_the_index_changes_nothing_that_is_read(tmp_path: Path, prepared: Prepared) -> None:
    samples, out = prepared[1][0][1], copied(prepared, tmp_path / "cache")
    wanted, file = contents(prepared[0], samples), out / "index.sqlite3"
    whole, refused = file.read_bytes(), 0
    for place in flips(file, 100):
        flip(file, *place)
        line = ""
        try:
            cache = Cache(out)
            cache.check(prepared[0].settings)
            assert_alike(contents(cache, samples), wanted)
        except DataError as error:
            line = str(error)
            refused += 1
        assert not line or (line.startswith(str(out)) and "; hint: " in line), line
        file.write_bytes(whole)
    assert refused > 50


@pytest.mark.parametrize(("name", "count"), [("index.sqlite3", 10), ("files.sqlite3", 15)])
def test_a_flipped_bit_of_a_table_is_named_or_mended(
    tmp_path: Path, prepared: Prepared, again: Callable[..., Prepared], name: str, count: int
) -> None:
    samples, refused, made = prepared[1][0][1], 0, 0
    wanted = contents(prepared[0], samples)
    for place in flips(prepared[0].folder / name, count):
        out = copied(prepared, tmp_path / "cache")
        flip(out / name, *place)
        try:
            cache, [(_, found)] = again(out)
        except LibrefluxError:
            refused += 1
        else:
            assert [sample.id for sample in found] == [sample.id for sample in samples]
            assert_alike(contents(cache, samples), wanted)
            made += 1
    assert made
    assert refused or name == "files.sqlite3"


def test_a_damaged_shard_is_made_anew_and_nothing_else(
    tmp_path: Path,
    prepared: Prepared,
    again: Callable[..., Prepared],
    encoded: list[Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = prepared[1][0][1]
    out = aged(copied(prepared, tmp_path / "cache"))
    monkeypatch.setattr(shards, "CHUNK", 512)  # several to a tensor, as in a real cache
    again(out, read_all=True)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    damaged = out / "shards" / "latents-00000001.safetensors"
    flip(damaged, damaged.stat().st_size - 9, 3)
    with pytest.raises(DataError, match=r"latents-00000001\.safetensors: damaged shard \(\w+/\S+, or what lies"):
        contents(Cache(out), samples)
    with caplog.at_level(logging.WARNING):
        cache, _ = again(out, read_all=True)
    [told] = [record.getMessage() for record in caplog.records]
    assert str(damaged) in told
    assert "is made anew" in told
    assert len(encoded) == 4  # a shard's
    after = {path.name: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert {name for name in before if after.get(name) != before[name]} == {damaged.name}
    assert_alike(contents(cache, samples), contents(prepared[0], samples))
    again(out, read_all=True)
    assert len(encoded) == 4


def test_a_damaged_row_is_made_anew_by_a_run_too(
    tmp_path: Path, prepared: Prepared, again: Callable[..., Prepared], encoded: list[Any]
) -> None:
    samples = prepared[1][0][1]
    out, key = copied(prepared, tmp_path / "cache"), latents_key(samples[0].id, NAMES[1])
    for change in ("shard = 7000", "key = 5", "width = 'wide'"):
        with closing(sqlite3.connect(out / "index.sqlite3")) as index, index:
            assert index.execute(f"UPDATE latents SET {change} WHERE key = ?", (key,)).rowcount == 1
        with pytest.raises(DataError, match=r"index\.sqlite3: 1 damaged row of latents; hint: run `libreflux prep"):
            Cache(out)
        encoded.clear()
        cache, _ = again(out)
        assert len(encoded) == 1
        assert_alike(contents(cache, samples), contents(prepared[0], samples))


def aged(out: Path) -> Path:
    """A cache as it was written before there were checksums."""
    for name, tables in (("index.sqlite3", ("latents", "texts", "shards")), ("files.sqlite3", ("files",))):
        with closing(sqlite3.connect(out / name)) as index, index:
            for table in tables:
                index.execute(f"ALTER TABLE {table} DROP COLUMN row_crc32")
            if "shards" in tables:
                index.execute("ALTER TABLE shards DROP COLUMN sums")
    return out


def test_a_cache_without_checksums_opens_and_gets_them_without_encoding(
    tmp_path: Path,
    prepared: Prepared,
    again: Callable[..., Prepared],
    encoded: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = prepared[1][0][1]
    out = aged(copied(prepared, tmp_path / "cache"))
    index = (out / "index.sqlite3").read_bytes()
    with caplog.at_level(logging.WARNING):
        assert_alike(contents(Cache(out), samples), contents(prepared[0], samples))
        again(out)
    [told] = [record.getMessage() for record in caplog.records]
    assert told == f"{out} was written without checksums: `libreflux prepare` adds them, encoding nothing"
    assert (out / "index.sqlite3").read_bytes() == index  # a run that finds all there writes nothing
    cache, _ = again(out, read_all=True)
    assert encoded == []
    assert len(caplog.records) == 1
    assert_alike(contents(cache, samples), contents(prepared[0], samples))
    for name in ("index.sqlite3", "files.sqlite3"):
        assert rows(out / name) == rows(prepared[0].folder / name)
    flip(out / "shards" / "texts-00000000.safetensors", -1)
    with pytest.raises(DataError, match=r"texts-00000000\.safetensors: damaged shard"):
        contents(Cache(out), samples)


def rows(file: Path) -> list[Any]:
    with closing(sqlite3.connect(file)) as index:
        tables = [name for (name,) in index.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        sums = {table: index.execute(f"SELECT * FROM {table}").description for table in tables}
        summed = [table for table, columns in sums.items() if any(column[0] == "row_crc32" for column in columns)]
        return [index.execute(f"SELECT count(*), count(row_crc32) FROM {table}").fetchone() for table in sorted(summed)]


def test_a_cache_without_checksums_that_is_only_read_stays_as_it_is(
    tmp_path: Path, prepared: Prepared, again: Callable[..., Prepared], encoded: list[Any]
) -> None:
    samples = prepared[1][0][1]
    out = aged(copied(prepared, tmp_path / "cache"))
    places = [out, *out.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        with bound_by_modes():
            cache, _ = again(out, read_all=True)
            assert_alike(contents(cache, samples), contents(prepared[0], samples))
            assert encoded == []
    finally:
        for place in places:
            place.chmod(0o755 if place.is_dir() else 0o644)


@pytest.mark.parametrize("name", ["/etc/hostname", "../../elsewhere.safetensors", "a/texts-00000000.safetensors", "x"])
def test_a_strange_shard_name_is_refused(
    tmp_path: Path, prepared: Prepared, again: Callable[..., Prepared], name: str
) -> None:
    out = aged(copied(prepared, tmp_path / "cache"))
    with closing(sqlite3.connect(out / "index.sqlite3")) as index, index:
        index.execute("UPDATE shards SET name = ? WHERE number = 1", (name,))
    for use in (lambda: Cache(out), lambda: Cache(out, partial=True), lambda: again(out, read_all=True)):
        with pytest.raises(DataError, match=r"index\.sqlite3: names a shard '.*', which is no shard's name; hint"):
            use()


@pytest.mark.parametrize("share", [0.0, 0.003, 0.14, 0.5])
def test_tables_cut_short_or_overwritten_are_one_line(
    tmp_path: Path,
    prepared: Prepared,
    again: Callable[..., Prepared],
    encoded: list[Any],
    caplog: pytest.LogCaptureFixture,
    share: float,
) -> None:
    noise = random.Random(0).randbytes
    for change in (lambda data, kept: data[:kept], lambda data, kept: data[:kept] + noise(len(data) - kept)):
        out = copied(prepared, tmp_path / "cache")
        for name in ("index.sqlite3", "files.sqlite3"):
            data = (out / name).read_bytes()
            (out / name).write_bytes(change(data, int(share * len(data))))
        with pytest.raises(DataError, match=r"index\.sqlite3: damaged index \(.*; hint: remove this cache folder"):
            again(out)
        shutil.copyfile(prepared[0].folder / "index.sqlite3", out / "index.sqlite3")
        _, [(_, found)] = again(out)
        assert [sample.id for sample in found] == [sample.id for sample in prepared[1][0][1]]
        assert rows(out / "files.sqlite3") == rows(prepared[0].folder / "files.sqlite3")
        assert not encoded
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "files.sqlite3 is damaged: what it remembered of files is read again" in told[0]


def test_a_cache_of_other_settings_is_refused_before_anything_of_it_is_removed(
    prepared: Prepared, tmp_path: Path, again: Callable[..., Prepared]
) -> None:
    out = copied(prepared, tmp_path / "cache")
    damaged = out / "shards" / "latents-00000001.safetensors"
    flip(damaged, damaged.stat().st_size - 9, 3)
    with pytest.raises(DataError, match="this cache was made with"):
        again(out, read_all=True, text_cache="int8")
    assert damaged.is_file()

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from libreflux.data import index
from libreflux.data.index import Rows, join_rows, latents_key, text_key
from libreflux.errors import DataError
from rights import bound_by_modes

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "index.py"


def rows(*table: tuple[int, int, int]) -> Rows:
    keys, shards, tokens = (np.array(column, np.int64) for column in zip(*table, strict=True))
    return Rows(keys, {"shard": shards, "tokens": tokens})


def test_rows_are_found_by_key_in_any_order() -> None:
    table = rows((5, 1, 50), (-3, 2, 30), (2**62, 3, 70))
    assert table.columns["tokens"][table.find([2**62, 5, -3])].tolist() == [70, 50, 30]
    assert table.find([4, -(2**63), 2**63 - 1]).tolist() == [-1, -1, -1]
    assert rows((1, 1, 1)).find([]).tolist() == []


def test_of_two_tables_what_is_stored_counts_before_what_is_counted() -> None:
    joined = join_rows([rows((1, 0, 11), (2, 7, 22)), rows((1, 9, 11), (2, 8, 22), (3, 0, 33))])
    assert joined.keys.tolist() == [1, 2, 3]
    assert joined.columns["shard"].tolist() == [9, 7, 0]


def test_keys_differ_with_every_part_of_their_name() -> None:
    assert (
        len({latents_key("a", "b"), latents_key("a", "c"), latents_key("b", "a"), text_key("a/b"), text_key("")}) == 5
    )
    assert all(-(2**63) <= text_key(str(number)) < 2**63 for number in range(1000))


SETTINGS = {"text_padding": "drop"}


def add_rows(folder: Path, count: int, pages: int) -> None:
    with index.connect(folder) as opened:
        opened.execute(f"PRAGMA max_page_count = {pages}")  # past that sqlite says what it says of a full disk
        with index.transaction(opened):
            index.add_rows(opened, "latents", [(key, 1, 4, 4) for key in range(count)])


def test_a_full_disk_and_a_read_only_one_are_not_called_damage(tmp_path: Path) -> None:
    with index.connect(tmp_path) as opened:
        index.begin(opened, tmp_path, SETTINGS)
    with pytest.raises(DataError, match=r"index\.sqlite3: database or disk is full; hint: make room"):
        add_rows(tmp_path, 10_000, pages=8)
    (tmp_path / index.INDEX).chmod(0o444)
    with (
        bound_by_modes(),
        pytest.raises(DataError, match=r"attempt to write a readonly database; hint: make"),
    ):
        add_rows(tmp_path, 1, pages=1000)
    (tmp_path / index.INDEX).chmod(0o644)
    add_rows(tmp_path, 10, pages=1000)
    with index.connect(tmp_path) as opened:
        assert opened.execute("SELECT count(*) FROM latents").fetchone() == (10,)  # the first keys: none was left


def test_thirty_thousand_samples_take_little_memory() -> None:
    """2 kB a sample, its path and captions included: a million fit in 2 GB."""
    command = [sys.executable, str(BENCHMARK), "30000"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert (found["peak_gb"] - found["imports_gb"]) * 1e9 < 2000 * 30_000
    assert found["index_seconds"] < 5
    assert found["padding_share"] < 0.1

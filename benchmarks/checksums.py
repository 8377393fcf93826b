"""What comparing checksums costs while a model or a cache is read, from the page cache: the dearest case.

    python benchmarks/checksums.py [GIGABYTES] [--folder DIR]

Writes an int8 part of GIGABYTES (default 1) in shards of half a gigabyte, and a cache's shard as large, into a
temporary folder in DIR. Reads the part tensor by tensor as an int8 model is read, without and with its checksums,
beside the reading; then the cache's shard in a random order, without and with. Prints one JSON line: seconds a
gigabyte, wall clock, the best of three, and the threads that sum.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SHARD = 2**29
TENSOR = 2**25
ITEM = 2**21  # 256 tokens of T5-XXL


def write_file(path: Path, size: int, piece: int) -> None:
    from libreflux.model.stream import stream_safetensors

    drawn = torch.randint(-127, 128, (piece,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    names = [f"{number:05d}" for number in range(max(1, size // piece))]
    path.parent.mkdir(parents=True, exist_ok=True)
    stream_safetensors(path, dict.fromkeys(names, (torch.int8, (piece,))), ((name, drawn) for name in names))


def read_part(folder: Path) -> None:
    from libreflux.model.ranges import RangedFile

    for path in sorted(folder.glob("*.safetensors")):
        file = RangedFile(path)
        for name in file.ranges:
            file.read(name).clone()


def read_verified(folder: Path) -> None:
    from libreflux.model import checksums

    checksums.compared.clear()  # as in a new process
    with checksums.verified_part(folder):
        read_part(folder)


def read_shard(path: Path, sums: bytes | None) -> None:
    from libreflux.data.shards import CheckedShard

    shard = CheckedShard(path, sums)
    names = [f"{number:05d}" for number in range(path.stat().st_size // ITEM)]
    random.Random(0).shuffle(names)
    for name in names:
        shard.read(name).clone()


def best(work: Callable[[], object]) -> float:
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gigabytes", nargs="?", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    from libreflux.checksums import THREADS
    from libreflux.data.shards import shard_sums
    from libreflux.model.checksums import write_checksums

    size = int(options.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        part, cached = Path(made) / "transformer", Path(made) / "latents-00000000.safetensors"
        for number in range(-(-size // SHARD)):
            write_file(part / f"{number}.safetensors", min(SHARD, size - number * SHARD), TENSOR)
        write_checksums(Path(made))
        write_file(cached, size, ITEM)
        sums = shard_sums(cached)
        seconds = {
            "part": best(lambda: read_part(part)),
            "part_compared": best(lambda: read_verified(part)),
            "shard": best(lambda: read_shard(cached, None)),
            "shard_compared": best(lambda: read_shard(cached, sums)),
            "shard_summed": best(lambda: shard_sums(cached)),
        }
    print(
        json.dumps({"threads": THREADS, **{name: round(one / options.gigabytes, 3) for name, one in seconds.items()}})
    )


if __name__ == "__main__":
    main()

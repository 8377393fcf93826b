"""How long a large prepared cache takes to open, and in how much memory: synthetic rows, real code.

    python benchmarks/index.py [SAMPLES] [--limit-seconds 60] [--limit-gb 2]

Writes an index of SAMPLES pictures (default 1,000,000) with two captions each, then measures, in a process of its own,
what a training run does before its first step: open the cache, find nothing missing in it, compare 1,000 held-out
pictures with the trained ones, address every sample, plan a step of epoch 0 and one of epoch 3. Prints one JSON line,
seconds of processor time; exits 1 beyond a limit. The list of samples itself, which
reading the folders gives, and the imports are in the peak memory; the making of the list is timed apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libreflux.data.order import Samples

SETTINGS = {"vae": "synthetic", "text_encoders": "synthetic", "text_padding": "drop"}
LATENTS, TEXTS = 1, 2  # the numbers of two shards
SENTENCE = "a red apple on a wooden table beside an open window in soft morning light with long shadows"
WORDS = SENTENCE.split()


def captions(number: int) -> tuple[str, str]:
    """About 40 and 290 characters, other ones for every picture."""
    turned = WORDS[number % 17 :] + WORDS[: number % 17]
    return f"{' '.join(turned[:6])} {number}", f"{' '.join(turned * 3)} {number}"


def identity(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def write_index(folder: Path, count: int) -> None:
    from libreflux.data import index
    from libreflux.data.crops import View
    from libreflux.data.shards import add_shard, shard_sums

    view = View("aspect", 512, 64)
    sizes = [(64, 64), (48, 80), (80, 48), (56, 72)]
    with index.connect(folder) as connection:
        index.begin(connection, folder, SETTINGS)
        with index.transaction(connection):
            for start in range(0, count, 2**14):
                here = range(start, min(start + 2**14, count))
                name = view.name(0, "white")
                rows = [(index.latents_key(identity(n), name), LATENTS, *sizes[n % 4]) for n in here]
                index.add_rows(connection, "latents", rows)
                texts = [(index.text_key(text), TEXTS, len(text) // 4) for n in here for text in captions(n)]
                index.add_rows(connection, "texts", texts)
            index.add_rows(connection, "texts", [(index.text_key(""), TEXTS, 1)])
            for number, kind in ((LATENTS, "latents"), (TEXTS, "texts")):
                shard = folder / index.SHARDS / f"{kind}-00000000.safetensors"
                shard.parent.mkdir(exist_ok=True)
                shard.write_bytes(b"x")  # nothing is read of it
                assert add_shard(connection, shard.name, 1, shard_sums(shard)) == number


def resident_gb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def padding_share(samples: Samples, batch: int) -> float:
    """Share of the first epoch's text tokens, in [0, 1), that are padding to the longest caption of their unit."""
    import numpy as np

    from libreflux.data.order import epoch_plan

    plan = epoch_plan(0, 0, samples, batch)
    lengths = samples.lengths(plan.items, plan.visits)
    return float(1 - lengths.sum() / (np.maximum.reduceat(lengths, plan.bounds[:-1]) * np.diff(plan.bounds)).sum())


def measure(folder: Path, count: int) -> dict[str, float]:
    from libreflux.data.batches import Batches
    from libreflux.data.cache import Cache
    from libreflux.data.crops import View
    from libreflux.data.held_out import refuse_trained, split
    from libreflux.data.order import step_plan
    from libreflux.data.prepare import Wanted
    from libreflux.data.sources import Sample
    from libreflux.recipe import DataSource

    imported = resident_gb()
    begun = time.process_time()
    samples = [
        Sample(identity(n), f"/pictures/{n // 1000:04d}/{n:08d}.jpg", captions(n), ("short", "long"))
        for n in range(count)
    ]
    listed = time.process_time()
    cache = Cache(folder)
    opened = time.process_time()
    source = DataSource(path="pictures", captions={"short": 0.3, "long": 0.7})
    view = View("aspect", 512, 64)
    todo = Wanted([(source, samples)], [view], [""], True).missing(cache)
    assert not todo, "an index of all of it lacks something"
    checked = time.process_time()
    others = [Sample(identity(n), f"/others/{n}.jpg", ("x",), ("",)) for n in range(count, count + 1000)]
    refuse_trained([(source, others)], [(source, samples)])
    _, apart = split([(source, samples)], 0.01)
    assert 0.005 < len(apart[0][1]) / count < 0.02
    del apart
    parted = time.process_time()
    batches = Batches(cache, [(source, samples)], views=[view], seed=0)
    addressed = time.process_time()
    first = step_plan(0, 0, batches.samples, 8, 4, 4)
    planned = time.process_time()
    step_plan(0, 3 * (count // 128) + 17, batches.samples, 8, 4, 4)
    again = time.process_time()
    assert sum(len(unit.items) for unit in first) > 64
    return {
        "samples": count,
        "list_seconds": listed - begun,
        "open_seconds": opened - listed,
        "missing_seconds": checked - opened,
        "held_out_seconds": parted - checked,
        "address_seconds": addressed - parted,
        "first_step_seconds": planned - addressed,
        "resume_seconds": again - planned,
        "index_seconds": again - listed,
        "padding_share": padding_share(batches.samples, 4),
        "imports_gb": imported,
        "peak_gb": resident_gb(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--limit-seconds", type=float, default=60.0)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.samples)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), options.samples)
        command = [sys.executable, __file__, str(options.samples), "--measure", folder]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    return int(found["index_seconds"] > options.limit_seconds or found["peak_gb"] > options.limit_gb)


if __name__ == "__main__":
    sys.exit(main())

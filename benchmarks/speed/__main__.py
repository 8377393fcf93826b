"""How long things take here, beside what others take, measured in turn within one run.

    python -m benchmarks.speed [PART...] [--size slice|full|emoji] [--device cpu|cuda] [--quick]
        [--out DIR] [--json FILE]
    python -m benchmarks.speed page [RESULTS.json...] > docs/performance.md    # default: the recorded ones

Each part is a process of its own and leaves DIR/PART.json; what is there is not measured again, unless `--again` asks
for it. The table is printed as parts end. What cannot be imported is skipped, and the table names it. The libraries
that libreflux is compared with come with `pip install libreflux[bench]`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.names import PARTS, wanted
from benchmarks.speed.results import text

from libreflux.processes import ask_for_large_pages

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if something of ours failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["page"]:
        from benchmarks.speed.page import page

        sys.stdout.write(page([Path(one) for one in words[1:]] or None))
        return 0
    ask_for_large_pages()  # as the command does; all contenders have them
    options = parsed(words)
    if options.here:
        with quiet():
            return run_part(options, options.parts[0])
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.wanted:
        again = options.again and (name in options.parts or not options.parts)
        if again or not (out / f"{name}.json").is_file():
            print(f"— {name} …", flush=True)
            failed |= child(options, name)
        if (out / f"{name}.json").is_file():
            print(text(json.loads((out / f"{name}.json").read_text(encoding="utf-8"))) + "\n", flush=True)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(together(out), indent=1) + "\n", encoding="utf-8")
    return int(failed)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all of the size")
    parser.add_argument("--size", choices=("slice", "full", "emoji"), help="default: slice on a CPU, full on a card")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, contenders and pixels")
    parser.add_argument("--only", action="append", metavar="CONTENDER", help="these alone, by name")
    parser.add_argument("--memory", type=float, metavar="GIB", help="that contenders may hold together")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which a part is ended")
    parser.add_argument("--out", default="out/bench", metavar="DIR", help="of the parts' files; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="all parts in one file")
    parser.add_argument("--again", action="store_true", help="measure what is there too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a part, in this process
    options = parser.parse_args(words)
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.size = options.size or ("full" if options.device == "cuda" else "slice")
    try:
        options.wanted = wanted(options.parts, options.size, options.quick)
    except ValueError as error:
        parser.error(str(error))
    return options


def child(options: argparse.Namespace, name: str) -> bool:
    """Whether the part failed, in a process of its own: an illegal access on a card spoils a process for good."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.speed", name, "--here", *for_child(options)]
    try:
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, timeout=options.limit, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: not done within {options.limit:g} s", flush=True)
        return True
    if done.returncode:
        print(f"{name}: failed (exit code {done.returncode})", flush=True)
    return done.returncode != 0


def for_child(options: argparse.Namespace) -> list[str]:
    """The options that a part's process needs."""
    words = ["--size", options.size, "--device", options.device, "--out", options.out]
    words += ["--quick"] if options.quick else []
    words += [] if options.memory is None else ["--memory", str(options.memory)]
    return words + [word for name in options.only or () for word in ("--only", name)]


def setting_of(options: argparse.Namespace, work: str = ".") -> Any:
    from benchmarks.speed.machine import room_bytes
    from benchmarks.speed.parts import Setting

    room = room_bytes(options.device) if options.memory is None else options.memory * 2**30
    only = frozenset(options.only) if options.only else None
    return Setting(options.size, options.device, options.quick, room, Path(work), only)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without other libraries' warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(before)


def run_part(options: argparse.Namespace, name: str) -> int:
    """Measures one part in this process and writes its file."""
    from benchmarks.speed.machine import described
    from benchmarks.speed.parts import WORK, as_json, limit_of

    out, begun = Path(options.out), time.time()
    with tempfile.TemporaryDirectory() as work:
        found = WORK[name](setting_of(options, work))
    tree = {
        "schema": SCHEMA,
        **as_json(name, found, limit_of(read_parts(out))),
        "size": options.size,
        "quick": options.quick,
        "date": time.strftime("%Y-%m-%d", time.gmtime(begun)),
        "took_seconds": round(time.time() - begun, 1),
        "machine": described(options.device),
    }
    temporary = out / f"{name}.json.tmp"
    temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / f"{name}.json")
    ours = [one for row in found.rows for one in row.measured if one.ours]
    return int(any((one.reason or "").startswith("failed") for one in ours))


def read_parts(out: Path) -> dict[str, Mapping[str, Any]]:
    """By name, those that are done."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}


def together(out: Path) -> dict[str, Any]:
    """All parts of a folder in one tree."""
    parts = read_parts(out)
    return {"schema": SCHEMA, "parts": [parts[name] for name in PARTS if name in parts]}


if __name__ == "__main__":
    sys.exit(main())

"""What freed the model, and how much of it? The recipe with three seeds, beside arms that could refute it.

    python -m benchmarks.freedom --work DIR                        # emoji-schnell, its own recipe; the thin table first
    python -m benchmarks.freedom --work DIR --base DIR/m/base --schnell DIR/m/schnell --random DIR/m/random \\
        --recipe freeing.yaml --pictures DIR/freeing --other openmoji=DIR/openmoji --data DIR/held-out --judge FILE
    python -m benchmarks.freedom --work DIR --quick                # every arm, two steps each: a few minutes

Arms: no training (the distilled model at its best guidance w, and times k(sigma), chosen on other pictures than those
measured); the recipe on the distilled model, with three seeds; on the base; on random weights; on pictures of another
distribution; and with other precisions of the base. One seed of every arm comes first, and its table; then the other
seeds. All is kept, and the same command goes on. The tables and the CSV are in DIR. Intervals of the main arm are over
seeds of the training and over pictures (`libreflux.probing.over_seeds`); those of the other arms over pictures.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import libreflux
from libreflux.cli.progress import progress
from libreflux.emoji import compose
from libreflux.emoji.build import students
from libreflux.files import atomic_write_text
from libreflux.printing import say, say_table
from libreflux.probing.freedom import FreedomRow, freedom
from libreflux.probing.no_training import NoTraining
from libreflux.probing.over_seeds import over_seeds
from libreflux.probing.report import no_training
from libreflux.probing.report.labels import number, place, title
from libreflux.probing.results import Result, read_result
from libreflux.probing.settings import QUICK, Changes

COLUMNS = (
    "arm",
    "seeds",
    "subjects",
    "measure",
    "place",
    "n",
    "value",
    "low",
    "high",
    "freedom",
    "freedom_low",
    "freedom_high",
    "snapped",
    "beyond",
    "verdict",
)
"""Of the CSV file: one row for each measure of each arm. Freedom is in per cent; schnell and base have none."""
MAIN = "recipe"
SEEDS = (0, 1, 2)
LESS: Changes = {
    "sigmas": (0.5, 0.9),
    "draw_steps": 4,
    "diversity_prompts": 2,
    "diversity_seeds": 2,
    "negative_prompts": 2,
    "padding_pictures": 2,
    "padding_tokens": (20,),
}
"""What `--quick` measures less than a quick probe."""
BRIEF: Sequence[tuple[str, Mapping[str, object]]] = (
    ("loss", {"sigma": "all", "text": "caption"}),
    ("loss", {"sigma": "all", "text": "empty"}),
    ("slope", {"sigma": "all", "text": "caption"}),
    ("slope", {"sigma": "all", "text": "empty"}),
    ("prompt_gain", {"sigma": 0.9}),
    ("guidance_response", {"sigma": 0.9}),
    ("clipped", {"guidance": 1.0}),
    ("clipped", {"guidance": 4.0}),
    ("latents_std", {"guidance": 4.0}),
    ("accuracy", {"guidance": 4.0, "what": "all"}),
    ("distance", {"guidance": 4.0, "kind": "FD"}),
    ("distance", {"guidance": 4.0, "kind": "KD"}),
    ("diversity", {"guidance": 1.0, "kind": "features"}),
    ("diversity", {"guidance": 1.0, "kind": "latents"}),
    ("straightness", {}),
    ("negative", {"what": "subject"}),
)
"""What the printed table has of all that is measured; a place that was not measured is left out."""


@dataclass(frozen=True)
class Arm:
    """One way to make a model.

    Attributes:
        name: in tables.
        model: that is trained.
        pictures: that it is trained on.
        precision: of the base's weights while it trains.
        seeds: of its trainings.
    """

    name: str
    model: str
    pictures: Path
    precision: str = "int8"
    seeds: tuple[int, ...] = (0,)


@dataclass
class Found:
    """What is measured so far.

    Attributes:
        ends: "schnell" and "base".
        arms: name to the results of its trainings.
        untrained: of the first training of the main arm.
    """

    ends: dict[str, Result] = field(default_factory=dict)
    arms: dict[str, list[Result]] = field(default_factory=dict)
    untrained: NoTraining | None = None

    def freed(self) -> dict[str, list[FreedomRow]]:
        """The freedom of each arm over its seeds."""
        schnell, base = self.ends["schnell"], self.ends["base"]
        return {name: freedom(over_seeds(results), schnell, base) for name, results in self.arms.items()}


def arms_of(args: argparse.Namespace) -> list[Arm]:
    """Every arm, the main one first."""
    seeds, first = tuple(args.seeds), args.precision[0]
    found = [Arm(MAIN, args.schnell, args.pictures, first, seeds)]
    found += [Arm("recipe on base", args.base, args.pictures, first)]
    found += [Arm("recipe on random", args.random, args.pictures, first)]
    for one in args.other:
        name, _, folder = one.partition("=")
        found.append(Arm(f"recipe on {name}", args.schnell, Path(folder), first))
    return found + [Arm(f"recipe, {kind}", args.schnell, args.pictures, kind, seeds) for kind in args.precision[1:]]


def train(args: argparse.Namespace, arm: Arm, seed: int) -> Path:
    """The run of one training, finished; it is resumed where it was left."""
    run = args.work / "runs" / f"{arm.name.replace(' ', '-').replace(',', '')}-{seed}{args.suffix}"
    tree: dict[str, Any]
    if args.recipe is None:
        tree = students.freeing(arm.model, arm.pictures, run).model_dump(mode="json", exclude_unset=True, by_alias=True)
    else:
        tree = yaml.safe_load(args.recipe.read_text("utf-8"))
    own = tree["data"][0] if arm.pictures == args.pictures else {"caption_dropout": 0.1}
    tree |= {
        "model": arm.model,
        "base": arm.precision,
        "data": [own | {"path": str(arm.pictures)}],
        "seed": seed,
        "cache": str(args.work / "cache"),
        "out": str(run),
    }
    tree |= {} if args.steps is None else {"steps": args.steps}
    if args.quick:
        tree |= {"batch": 2, "resolution": 64, "steps": 2, "save": {"every": 1}}
        tree["optimizer"] = tree["optimizer"] | {"warmup": 0}
    done = libreflux.train(tree)
    if done.stopped is not None:
        raise done.stopped
    return run


def probe(args: argparse.Namespace, arm: Arm, seed: int, found: Found) -> Result:
    """A training's result. The first one's probe also measures both ends and the controls without training."""
    out = args.work / "probes" / f"{arm.name.replace(' ', '-').replace(',', '')}-{seed}{args.suffix}"
    asked: dict[str, Any] = {"data": args.data, "judge": args.judge, "features": args.features, "seen": args.seen}
    asked = {name: value for name, value in asked.items() if value is not None} | {"out": out, "progress": progress}
    if args.quick:
        asked |= {"quick": True, "pictures": 4, "prompts": 2, "guidance": [1, 4], "steps": [2, 4], "resolution": 64}
    else:
        asked |= {"prompts": 48, "guidance": [1, 2, 4, 8], "steps": [4, 28], "pictures": args.measured}
    run = train(args, arm, seed)
    if found.ends:
        return libreflux.probe(arm.model, adapters=[str(run)], **asked).result
    whole = libreflux.probe(arm.model, adapters=[str(run)], against=args.schnell, reference=args.base, **asked)
    found.ends = {"schnell": read_result(out / "against"), "base": read_result(out / "reference")}
    found.untrained = whole.untrained
    return whole.result


def table(found: Found) -> str:
    """As Markdown: the main measures of every arm with their freedom, and of the controls without training."""
    freed, untrained = found.freed(), found.untrained
    heads = ["measure", "n", "schnell", *no_training.heads(untrained), *(f"{name} (freedom)" for name in freed), "base"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    results = {name: over_seeds(each) for name, each in found.arms.items()} | found.ends
    family = str((found.ends["base"].settings.get("data") or ("",))[0])
    for row in _main(freed[MAIN]):
        name, at = title(row.name, row.at, family)
        cells = [", ".join(filter(None, (name, place(at)))), "" if row.count is None else str(row.count)]
        cells += [_cell(found.ends["schnell"], row, row.distilled), *no_training.cells(untrained, row)]
        for arm, rows in freed.items():
            one = next((each for each in rows if _key(each) == _key(row)), None)
            cells.append("–" if one is None else f"{_cell(results[arm], one, one.freed)} ({one.text})")
        lines.append(f"| {' | '.join([*cells, _cell(found.ends['base'], row, row.reference)])} |")
    seeds = ", ".join(f"{name}: {len(each)}" for name, each in found.arms.items())
    told = "" if untrained is None else f"\n\n{no_training.explained(untrained)}"
    return "\n".join(lines) + f"\n\n{no_training.STAR} Trainings: {seeds}.{told}"


def csv_rows(found: Found) -> Iterator[list[str]]:
    """Every measure of every arm, by `COLUMNS`."""
    freed = found.freed()
    parts = [(name, len(found.arms[name]), over_seeds(found.arms[name]), rows) for name, rows in freed.items()]
    for row in freed[MAIN]:
        for end, value in (("schnell", row.distilled), ("base", row.reference)):
            yield [end, "1", *_told(row), *_numbers(found.ends[end], row, value), *[""] * 6]
    for name, seeds, result, rows in parts:
        for row in rows:
            yield [name, str(seeds), *_told(row), *_numbers(result, row, row.freed), *_share(row)]
    for one in () if found.untrained is None else found.untrained.rows:
        told = f"no training, {one.kind}"
        yield [told, "0", *_told(one.control), number(one.control.freed), "", "", *_share(one.control)]


def _told(row: FreedomRow) -> list[str]:
    name, at = title(row.name, row.at, "")
    return [row.subset, name, place(at), "" if row.count is None else str(row.count)]


def _share(row: FreedomRow) -> list[str]:
    known = row.verdict in ("gap", "gap too noisy")
    numbers = [f"{100 * one:.0f}" for one in (row.share, row.low, row.high)] if known else [""] * 3
    return [*numbers, "yes" if known and row.snapped else "", "yes" if row.beyond else "", row.verdict]


def _main(rows: Sequence[FreedomRow]) -> list[FreedomRow]:
    every = [row for row in rows if row.subset == "all"]
    return [row for name, at in BRIEF for row in every if row.name == name and dict(row.at) == at]


def _key(row: FreedomRow) -> tuple[object, ...]:
    return row.name, tuple(sorted(row.at.items(), key=str)), row.subset


def _numbers(result: Result, row: FreedomRow, value: float) -> list[str]:
    """A value and the ends of its interval; a mean over noise levels has none of its own."""
    at = dict(row.at)
    if at.get("guidance") == "own":
        at["guidance"] = result.settings["own_guidance"]
    one = result.find(row.name, row.subset, **at)
    return [number(value), "", ""] if one is None else [number(each) for each in (one.value, one.low, one.high)]


def _cell(result: Result, row: FreedomRow, value: float) -> str:
    shown, low, high = _numbers(result, row, value)
    return f"{shown} [{low}, {high}]" if low else shown


def write(args: argparse.Namespace, found: Found, name: str) -> None:
    """The table and the CSV of what is measured so far."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(csv_rows(found))
    atomic_write_text(args.work / f"{name}{args.suffix}.csv", held.getvalue())
    atomic_write_text(args.work / f"{name}{args.suffix}.md", table(found) + "\n")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the emoji family's own where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--schnell", default="emoji-schnell", help="the distilled model: a name or a folder")
    parser.add_argument("--base", default="emoji-base", help="what it was distilled from")
    parser.add_argument("--random", help="a model of random weights; default: emoji-base's shape")
    parser.add_argument(
        "--recipe", type=Path, help="YAML; its model, data, seed and out are set; default: emoji-libre's"
    )
    parser.add_argument("--pictures", type=Path, help="captioned pictures to free it with; default: composed ones")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=DIR", help="of another distribution")
    parser.add_argument("--data", type=Path, help="captioned held-out pictures; default: the emoji family's")
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--features", type=Path, help="folder of a vision model, in the judge's place")
    parser.add_argument("--seen", type=Path, help="subjects that the pictures show, one a line")
    parser.add_argument("--precision", default="int8", help="of the base in training, with commas; the first is main")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the main arm, with commas")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--measured", type=int, default=192, help="held-out pictures, at most")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    args.suffix = "-quick" if args.quick else ""
    if args.quick:
        QUICK.update(LESS)
    args.seeds = [int(one) for one in args.seeds.split(",")][: 2 if args.quick else None]
    args.precision = args.precision.split(",")
    args.random = args.random or str(students.random_model(args.work))
    if args.pictures is None:
        args.pictures = args.work / f"composed{args.suffix}"
        if not (args.pictures / "metadata.jsonl").is_file():
            compose.write_folder(args.pictures, 12 if args.quick else 4500, 11)
    if args.quick and not args.other:  # so that the arm is tried
        folder = args.work / "pencil-quick"
        if not (folder / "metadata.jsonl").is_file():
            compose.write_folder(folder, 12, 12, look="pencil")
        args.other = [f"pencil={folder}"]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    found, arms = Found(), arms_of(args)
    for arm in arms:
        found.arms[arm.name] = [probe(args, arm, arm.seeds[0], found)]
        say(f"{arm.name}: trained and measured")
        write(args, found, "thin")
    say_table(table(found))
    for arm in arms:
        for seed in arm.seeds[1:]:
            found.arms[arm.name].append(probe(args, arm, seed, found))
            say(f"{arm.name}, seed {seed}: trained and measured")
            write(args, found, "freedom")
    write(args, found, "freedom")
    say_table(table(found))


if __name__ == "__main__":
    main()

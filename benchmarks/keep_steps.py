"""Which way of fine-tuning a distilled model keeps its few steps? Thirteen ways, on new sets, with seeds.

    python -m benchmarks.keep_steps --work DIR                 # emoji-schnell, the set "look": table, plot and page
    python -m benchmarks.keep_steps --work DIR --thin          # first: six arms, one seed, the first set
    python -m benchmarks.keep_steps --work DIR --quick         # every arm in the small, in minutes
    python -m benchmarks.keep_steps --work DIR --family artists --student S --base B --judge J \\
        --sets look,subjects,other --other CLIP_ART            # other models; a folder of captioned pictures

Every arm trains an adapter on one set, and `libreflux.probe_few_steps` measures its checkpoints: what it learnt of
pictures of the same kind that it was not trained on, and what it kept of few-step drawing on other prompts. 0 % kept is
one broken adapter for each set: trained directly at three times the learning rate. Interrupted, the same command goes
on. DIR gets keep-steps.csv, a plot for each set, and index.html; docs/keep-steps.md says what the shares are. The
numbers of --quick mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.keep_steps_page import write_results
from benchmarks.keep_steps_sets import FAMILIES, NewSet, new_sets, plain_folder

import libreflux
from libreflux.files import atomic_write_json, atomic_write_text

MAIN = ("direct", "adapter-own", "guided-3", "hold-0.2", "on-base", "redistilled")
"""The arms with three seeds on every set."""
CHANGES: dict[str, dict[str, Any]] = {
    "direct": {},
    "adapter-own": {"training_adapter": "own"},
    "adapter-real": {"training_adapter": "real"},
    **{f"guided-{scale}": {"guided_target": {"scale": scale}} for scale in (2, 3, 4)},
    **{f"hold-{weight}": {"hold_base": {"weight": weight}} for weight in (0.05, 0.2, 0.5)},
    "adapter-own+guided-3": {"training_adapter": "own", "guided_target": {"scale": 3}},
    "on-base": {"on_base": True},
    "speed-adapter": {"on_base": True},
    "redistilled": {},
}
ARMS = tuple(CHANGES)


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        pictures: of a set, to train on, and as many to measure on.
        own: pictures of a training adapter.
        steps, batch, every: of a run.
        prompts: outside of the set.
        resolution: pixels.
        rank: of the speed adapter.
    """

    pictures: int = 30
    own: int = 64
    steps: int = 200
    batch: int = 16
    every: int = 50
    prompts: int = 24
    resolution: int = 128
    rank: int = 64


QUICK = Size(pictures=6, own=4, steps=2, batch=2, every=1, prompts=3, resolution=64, rank=4)


@dataclass(frozen=True)
class Job:
    """One run of one arm."""

    new: NewSet
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.new.name}-{self.arm}-{self.seed}"


class Bench:
    """Runs jobs in a folder, each once.

    Args:
        asked: the command's arguments.
        size: how much.
    """

    def __init__(self, asked: argparse.Namespace, size: Size) -> None:
        self.asked, self.size, self.work = asked, size, Path(asked.work)
        self.family = FAMILIES[asked.family]
        self.prompts = self.work / "prompts.txt"
        if not self.prompts.is_file():
            self.prompts.write_text("\n".join(self.family.prompts(size.prompts)) + "\n", encoding="utf-8")

    def run(self, job: Job) -> None:
        """Trains and measures, unless that is there."""
        done = self.work / "results" / f"{job.name}.json"
        if done.is_file():
            return
        print(f"-- {job.name}", flush=True)
        began = time.monotonic()
        model, adapters = self._trained(job)
        trained = time.monotonic() - began
        broken = self._train(job.new, "broken", 0, optimizer={"learning_rate": 3 * self.asked.learning_rate})
        points, pages = list[Any](), self.work / "pages"
        for number, each in enumerate(adapters):
            found = libreflux.probe_few_steps(
                model,
                adapters=each,
                data=job.new.new,
                prompts=self.prompts,
                against=self.asked.student,
                broken=broken / "adapter.safetensors",
                out=self.work / "probes" / job.new.name,  # one for all: the distilled model draws once
                judge=self.asked.judge,
                features=self.asked.features,
                resolution=self.size.resolution,
            )
            points += json.loads(found.file.read_text(encoding="utf-8"))["points"]
            name = job.name if len(adapters) == 1 else f"{job.name}-{number}"
            atomic_write_text(pages / f"{name}.html", found.page.read_text(encoding="utf-8"))
        told = {"set": job.new.name, "arm": job.arm, "seed": job.seed, "seconds": round(trained), "points": points}
        if len(adapters) > 1:  # of several adapters together the probe knows no step
            for point, each in zip(points, adapters, strict=True):
                point["step"] = int(Path(each[0]).parent.name.removeprefix("step-"))
        atomic_write_json(done, told)

    def _trained(self, job: Job) -> tuple[str, list[Any]]:
        """The model that is measured, and its adapters: a run, or what lies together on it for each checkpoint."""
        changes = dict(CHANGES[job.arm])
        if job.arm == "redistilled":
            return self._redistilled(job)
        if (kind := changes.pop("training_adapter", None)) is not None:
            file = self._training_adapter(kind) / "adapter.safetensors"
            changes["adapter"] = {**self._adapter(), "training_adapter": str(file)}
        on_base = changes.pop("on_base", False)
        name = "on-base" if on_base else job.arm  # both arms on the base share a run
        run = self._train(job.new, name, job.seed, model=self.asked.base if on_base else self.asked.student, **changes)
        if job.arm != "speed-adapter":
            return self.asked.student, [run]
        speed = self.work / "speed.safetensors"
        if not speed.is_file():
            libreflux.diff(self.asked.base, self.asked.student, rank=self.size.rank, out=speed)
        steps = sorted((run / "checkpoints").glob("step-*/adapter.safetensors"))
        return self.asked.base, [[str(one), str(speed)] for one in steps]

    def _redistilled(self, job: Job) -> tuple[str, list[Any]]:
        """Freed on real pictures, trained on the set, and distilled to the student's steps again."""
        steps = libreflux.open_model(self.asked.student).facts.steps
        freed = self._merged("freed", self.asked.student, self._run("free", self._recipe("free", self._real(), 0)))
        styled = self._train(job.new, "on-freed", job.seed, model=freed)
        whole = self._merged(f"styled-{job.new.name}-{job.seed}", freed, styled)
        data = [{"path": str(job.new.train)}, {"path": str(self._real())}]
        distil = {"objective": "distil", "distil": {"guidance": 3.0, "steps": steps, "substeps": 4}}
        recipe = self._recipe(job.name, job.new.train, job.seed, model=whole, **distil) | {"data": data}
        return whole, [self._run(job.name, recipe)]

    def _training_adapter(self, kind: str) -> Path:
        data = self._real()
        if kind == "own":
            data = self.work / "own"
            others = self.work / "own.txt"
            others.write_text("\n".join(self.family.prompts(2 * self.size.own)[-self.size.own :]), encoding="utf-8")
            libreflux.generate_folder(others, model=self.asked.student, count=self.size.own, out=data, batch=8)
        name = f"training-adapter-{kind}"
        adapter = {**self._adapter(), "role": "training_adapter"}
        return self._run(name, self._recipe(name, data, 0, adapter=adapter))

    def _real(self) -> Path:
        return plain_folder(self.work, self.family, self.size.own)

    def _merged(self, name: str, model: str, run: Path) -> str:
        out = self.work / "models" / name
        if not out.is_dir():
            libreflux.merge(model, [run / "adapter.safetensors"], out=out)
        return str(out)

    def _train(self, new: NewSet, name: str, seed: int, **changes: Any) -> Path:
        whole = f"{new.name}-{name}-{seed}"
        return self._run(whole, self._recipe(whole, new.train, seed, **changes))

    def _run(self, name: str, recipe: Mapping[str, Any]) -> Path:
        """A run; one that is finished is not opened again."""
        out = self.work / "runs" / name
        if not (out / "adapter.safetensors").is_file():
            libreflux.train(dict(recipe))
        return out

    def _adapter(self) -> dict[str, Any]:
        return {"init": "ones", "targets": [{"layers": "**", "factor": 2}]}

    def _recipe(self, name: str, data: Path, seed: int, **changes: Any) -> dict[str, Any]:
        size = self.size
        rate = {"learning_rate": self.asked.learning_rate, **changes.pop("optimizer", {})}
        return {
            "model": self.asked.student,
            "base": "fp32",
            "data": [{"path": str(data), "caption_dropout": 0.1}],
            "resolution": size.resolution,
            "adapter": self._adapter(),
            "batch": size.batch,
            "steps": size.steps,
            "optimizer": {"kind": "adamw", "weight_decay": 0.0, "warmup": size.steps // 10, **rate},
            "ema": [],
            "samples": {"every": 0},
            "save": {"every": size.every, "keep": 99},
            "seed": seed,
            "out": str(self.work / "runs" / name),
            **changes,
        }


def jobs(sets: Sequence[NewSet], arms: Sequence[str], seeds: Sequence[int], *, thin: bool) -> Iterator[Job]:
    """The most telling first: the main arms on the first set, on the others, the other arms, then more seeds."""
    first = [arm for arm in MAIN if arm in arms]
    for new in sets[: 1 if thin else None]:
        yield from (Job(new, arm, seeds[0]) for arm in first)
    if thin:
        return
    for new in sets:
        yield from (Job(new, arm, seeds[0]) for arm in arms if arm not in first)
    for seed in seeds[1:]:
        yield from (Job(new, arm, seed) for new in sets for arm in first)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--student", default="emoji-schnell", help="the distilled model: a name or a folder")
    parser.add_argument("--base", default="emoji-base", help="what it was distilled from")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="emoji", help="whose pictures and captions")
    parser.add_argument("--judge", type=Path, help="judge of the models' subjects; default: the emoji family's")
    parser.add_argument("--features", type=Path, help="local vision model in the judge's place")
    parser.add_argument("--sets", default="look", help="of look, subjects, other")
    parser.add_argument("--look", type=Path, help="captioned folder in place of the family's")
    parser.add_argument("--subjects", type=Path, help="captioned folder in place of the family's")
    parser.add_argument("--other", type=Path, help="captioned folder of another kind, such as clip art")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="of a run")
    parser.add_argument("--every", type=int, help="steps between checkpoints, which are all measured")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--thin", action="store_true", help="six arms, one seed, the first set")
    parser.add_argument("--quick", action="store_true", help="every arm in the small: numbers mean nothing")
    parser.add_argument("--page", action="store_true", help="write the page of what is there, and train nothing")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    size = QUICK if asked.quick else Size()
    size = Size(**{**vars(size), **{k: v for k in ("steps", "every") if (v := getattr(asked, k)) is not None}})
    arms, seeds = asked.arms.split(","), [int(one) for one in asked.seeds.split(",")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise SystemExit(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    asked.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked, size)
    folders = {name: getattr(asked, name) for name in ("look", "subjects", "other")}
    sets = list(new_sets(asked.work, bench.family, asked.sets.split(","), folders, size.pictures))
    plan = list(jobs(sets, arms, seeds[:1] if asked.quick else seeds, thin=asked.thin))
    title = f"{asked.student}: {size.steps} steps of {size.batch}{', a quick trial' if asked.quick else ''}"
    for job in () if asked.page else plan:
        bench.run(job)
        write_results(asked.work, title, MAIN)
    for path in write_results(asked.work, title, MAIN):
        print(path)


if __name__ == "__main__":
    main()

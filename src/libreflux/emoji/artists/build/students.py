"""The student of emoji-base, trained against an adversary, and the model that is set free from it.

The student first learns guidance by regression, then few steps against heads on the teacher's own features (LADD,
Sauer et al. 2024, arXiv 2403.12015), on pictures that the teacher drew with guidance. The freed model learns composed
pictures of two thirds of the subjects by the shipped recipe, never the teacher's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from libreflux import seeding
from libreflux.adapter.io import load_adapter
from libreflux.adapter.merge import merge
from libreflux.emoji.artists import captions as grammar
from libreflux.emoji.artists import held_out, scenes, training_scenes
from libreflux.emoji.artists.build.base import SCENE_SEED, SCENES, working_dtype
from libreflux.emoji.artists.subjects import subjects
from libreflux.emoji.build.base import replaced
from libreflux.emoji.build.students import LIBRE_LAYERS
from libreflux.files import atomic_write_text, staged_dir
from libreflux.model.opening import open_model
from libreflux.model.save import LiveParts, save_model
from libreflux.recipe import Recipe
from libreflux.training.loop import fit

GUIDANCE = 3.0  # of the teacher's pictures
TAUGHT, TEACH_SEED = 4_000, 41
GUIDED_STEPS, ADVERSARIAL_STEPS, FREEING_STEPS = 600, 3_000, 1_500
FREEING_PICTURES, FREEING_SEED = 6_000, 51
CAPTION_SHARES = {"bare": 0.2, "short": 0.45, "full": 0.2, "tags": 0.05, "long": 0.1}

_COMMON: dict[str, Any] = {
    "schema": 1,
    "text_padding": "drop",
    "resolution": 128,
    "batch": 32,
    "samples": {"every": 0},
    "save": {"every": 100, "keep": 2},
    "seed": 0,
}
TAUGHT_LAYERS = ("transformer_blocks.**", "single_transformer_blocks.**", "norm_out.*", "proj_out")
"""What differs in the student; what reads the noise level, the latents and the text it shares with its teacher."""
_FULL_RANK = {
    "kind": "lokr",
    "init": "ones",
    "targets": [{"layers": layers, "factor": 1} for layers in TAUGHT_LAYERS],
}


def _precision() -> str:
    return "bf16" if working_dtype() is torch.bfloat16 else "fp32"


def seen_subjects() -> list[str]:
    """The two thirds of the subjects that the freed model learns from; sorted."""
    names = [subject.name for subject in subjects()]
    order = seeding.rng(0, "artists-libre-subjects").permutation(len(names))
    return sorted(names[i] for i in order[: round(len(names) * 2 / 3)])


def shows_only(what: scenes.Scene, names: set[str] | None) -> bool:
    """Whether a scene shows no other subject than these; None: any may be shown."""
    return names is None or {figure.subject.name for figure in what.figures} <= names


def write_index(count: int = SCENES) -> Path:
    """The index of all that the family's models were trained on, in the package: of so many scenes for the base."""
    names = set(seen_subjects())
    return training_scenes.write(
        [
            training_scenes.listed(SCENE_SEED, count),
            training_scenes.listed(TEACH_SEED, TAUGHT),
            training_scenes.listed(FREEING_SEED, FREEING_PICTURES, lambda what: shows_only(what, names)),
        ]
    )


def write_pictures(folder: Path, count: int, seed: int, names: set[str] | None = None) -> Path:
    """`count` training scenes as a captioned folder, of the named subjects alone; a whole one is kept."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    with staged_dir(folder) as staging:
        rows: list[str] = []
        index = 0
        while len(rows) < count:
            what = held_out.training_scene(seed, index)
            index += 1
            if not shows_only(what, names):
                continue
            name = f"{len(rows):05d}.png"
            scenes.render(what).save(staging / name)
            rows.append(json.dumps({"file_name": name, "captions": grammar.captions(what)}))
        atomic_write_text(staging / "metadata.jsonl", "\n".join(rows) + "\n")
    return folder


def teaching_prompts(work: Path) -> Path:
    """A file of `TAUGHT` captions of training scenes, one a line."""
    kinds = list(CAPTION_SHARES)
    rng = seeding.rng(TEACH_SEED, "teaching-prompts")
    chosen = rng.choice(len(kinds), TAUGHT, p=list(CAPTION_SHARES.values()))
    lines = [
        grammar.captions(held_out.training_scene(TEACH_SEED, index))[kinds[kind]] for index, kind in enumerate(chosen)
    ]
    atomic_write_text(work / "teaching-prompts.txt", "\n".join(lines) + "\n")
    return work / "teaching-prompts.txt"


def draw_teaching(work: Path, *, count: int = TAUGHT, batch: int = 16) -> Path:
    """The teacher's pictures of these prompts, drawn with guidance by the command line, which resumes: `work/drawn`."""
    out = work / "drawn"
    command = [sys.executable, "-m", "libreflux", "generate", "--prompts", str(teaching_prompts(work))]
    command += ["--model", str(work / "m" / "base"), "--guidance", str(GUIDANCE), "--count", str(count)]
    subprocess.run([*command, "--batch", str(batch), "--out", str(out)], check=True)
    return out


def guided_recipe(work: Path, *, steps: int = GUIDED_STEPS) -> Recipe:
    """The teacher's guided velocity in one pass, learnt on composed pictures."""
    tree = {
        **_COMMON,
        "model": str(work / "m" / "base"),
        "base": _precision(),
        "objective": "distil",
        "distil": {"guidance": GUIDANCE},
        "data": [{"path": str(work / "composed"), "captions": CAPTION_SHARES, "caption_dropout": 0.1}],
        "adapter": _FULL_RANK,
        "sigmas": {"law": "uniform", "stratified": True},
        "steps": steps,
        "optimizer": _adamw(3e-4, steps),
        "out": str(work / "runs" / "guided"),
    }
    return Recipe.model_validate(tree)


def adversarial_recipe(work: Path, *, steps: int = ADVERSARIAL_STEPS) -> Recipe:
    """Four steps against heads on the teacher's features, from the guided regression on."""
    tree = {
        **_COMMON,
        "model": str(work / "m" / "base"),
        "base": _precision(),
        "objective": "distil",
        "distil": {
            "steps": 4,
            "adversarial": {"noise_mean": 0.0, "learning_rate": 5e-4, "warmup": min(300, steps // 4)},
        },
        "data": [{"path": str(work / "drawn"), "caption_dropout": 0.0}],
        "adapter": {"kind": "lokr", "init_from": str(work / "runs" / "guided" / "adapter.safetensors")},
        "steps": steps,
        "optimizer": {**_adamw(5e-5, steps), "betas": [0.0, 0.99], "schedule": "constant"},
        "ema": [0.1],
        "out": str(work / "runs" / "adversarial"),
    }
    return Recipe.model_validate(tree)


def freeing_recipe(work: Path, model: Path, run: str, *, steps: int = FREEING_STEPS) -> Recipe:
    """The shipped recipe, on composed pictures of two thirds of the subjects."""
    tree = {
        **_COMMON,
        "model": str(model),
        "base": "int8",
        "data": [{"path": str(work / "freeing"), "captions": CAPTION_SHARES, "caption_dropout": 0.1}],
        "adapter": {
            "kind": "lokr",
            "init": "perturbed",
            "targets": [{"layers": layers, "factor": 2} for layers in LIBRE_LAYERS],
        },
        "sigmas": {"law": "beta", "alpha": 2.0, "beta": 2.0, "stratified": True},
        "steps": steps,
        "optimizer": _adamw(1e-3, steps),
        "out": str(work / "runs" / run),
    }
    return Recipe.model_validate(tree)


def _adamw(rate: float, steps: int) -> dict[str, Any]:
    warmup = min(50, steps // 4)
    return {"kind": "adamw", "learning_rate": rate, "weight_decay": 0.0, "warmup": warmup, "schedule": "cosine"}


def schnell(
    work: Path, *, guided: int = GUIDED_STEPS, adversarial: int = ADVERSARIAL_STEPS, taught: int = TAUGHT
) -> Path:
    """Makes the student (or resumes), and returns its merged model, `work/m/schnell`."""
    write_pictures(work / "composed", TAUGHT, TEACH_SEED)
    fit(guided_recipe(work, steps=guided))
    draw_teaching(work, count=taught)
    adapter = fit(adversarial_recipe(work, steps=adversarial))
    return merged(work / "m" / "base", adapter, work / "m" / "schnell", steps=4, guidance=1.0)


def libre(work: Path, *, steps: int = FREEING_STEPS) -> Path:
    """Sets the student free (or resumes), and returns its merged model, `work/m/libre`."""
    write_pictures(work / "freeing", FREEING_PICTURES, FREEING_SEED, set(seen_subjects()))
    adapter = fit(freeing_recipe(work, work / "m" / "schnell", "libre", steps=steps))
    return merged(work / "m" / "schnell", adapter, work / "m" / "libre", steps=28, guidance=GUIDANCE)


def merged(model: Path, adapter: Path, out: Path, *, steps: int, guidance: float) -> Path:
    """A model with an adapter merged in, and its own defaults: written anew."""
    import dataclasses

    source = open_model(model)
    transformer = source.load_transformer()
    merge(transformer, load_adapter(adapter))
    facts = dataclasses.replace(source.facts, steps=steps, guidance=guidance, lineage={"name": f"emoji-{out.name}"})
    return replaced(out, lambda fresh: save_model(fresh, facts, LiveParts(transformer=transformer), source))

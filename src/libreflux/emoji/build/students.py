"""emoji-schnell, distilled from emoji-base, and emoji-libre, set free again: the recipes, run by the public trainer.

Schnell is a full-rank fine-tune in three runs, each of which starts from the merged result of the one before: the
teacher's guided velocity in one pass, eight steps for its thirty-two, four for their eight. Libre is the shipped
recipe on pictures of two thirds of the subjects, never on the teacher or what it draws.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from libreflux import seeding
from libreflux.adapter.io import load_adapter
from libreflux.adapter.merge import merge
from libreflux.emoji import compose
from libreflux.emoji.build import base
from libreflux.files import atomic_write_text
from libreflux.model.facts import Facts, freed, read_facts, write_facts
from libreflux.model.int8 import quantise
from libreflux.model.int8_files import share_equal, write_all_checksums
from libreflux.model.locate import PARTS
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.save import LiveParts, save_model
from libreflux.model.source import ModelSource
from libreflux.recipe import Recipe
from libreflux.training.callbacks import Callbacks
from libreflux.training.loop import fit

WEIGHTS = Path(compose.__file__).parent / "weights"
MODELS = "m"
"""Folder of the merged models in floating point, below the working folder."""

DISTILLATIONS: dict[str, tuple[dict[str, Any], int]] = {
    "guided": ({"guidance": 3.0}, 400),
    "eight": ({"guidance": 1.0, "steps": 8, "substeps": 4}, 200),
    "four": ({"guidance": 1.0, "steps": 4, "substeps": 2}, 300),
}
"""Run → what it distils, and its steps."""
FREEING_STEPS = 800
CONTROLS: dict[str, tuple[str | None, int]] = {
    "free-50": ("emoji-schnell", 50),
    "free-250": ("emoji-schnell", 250),
    "control-base": ("emoji-base", FREEING_STEPS),
    "control-random": (None, FREEING_STEPS),
}
"""Run → model (None: random weights) and steps."""
SUBJECTS = "libre-subjects"
LIBRE_LAYERS = (
    "transformer_blocks.*.attn.**",
    "transformer_blocks.*.ff*.**",
    "single_transformer_blocks.*.attn.**",
    "single_transformer_blocks.*.proj_*",
)
"""Attention and feed-forward; what is left as it was, AdaLN above all, emoji-libre shares with emoji-schnell."""

_COMMON: dict[str, Any] = {
    "schema": 1,
    "text_padding": "drop",
    "resolution": 128,
    "batch": 32,
    "samples": {"every": 0},
    "save": {"every": 100, "keep": 2},
    "seed": 0,
}
_CAPTIONS = {"captions": {"short": 0.7, "long": 0.3}, "caption_dropout": 0.1}


def seen_subjects() -> list[str]:
    """The two thirds of the subjects that emoji-libre learns from, by a keyed draw; sorted."""
    names = [subject.name for subject in compose.subjects()]
    order = seeding.rng(0, SUBJECTS).permutation(len(names)).tolist()
    return sorted(names[i] for i in order[: round(len(names) * 2 / 3)])


def distillation(run: str, model: str | Path, pictures: Path, out: Path) -> Recipe:
    """The recipe of one run on the way to emoji-schnell."""
    spec, steps = DISTILLATIONS[run]
    return Recipe.model_validate(
        {
            **_COMMON,
            "model": str(model),
            "base": "bf16",
            "objective": "distil",
            "distil": spec,
            "data": [{"path": str(pictures), **_CAPTIONS}],
            "adapter": {"kind": "lokr", "init": "ones", "targets": [{"layers": "**", "factor": 1}]},
            "sigmas": {"law": "uniform", "stratified": True},
            "steps": steps,
            "optimizer": _adamw(3e-4),
            "cache": str(pictures.with_name(f"{pictures.name}-cache")),
            "out": str(out),
        }
    )


def freeing(model: str | Path, pictures: Path, out: Path, *, steps: int = FREEING_STEPS, base: str = "int8") -> Recipe:
    """The recipe that makes emoji-libre, and its controls on other models."""
    return Recipe.model_validate(
        {
            **_COMMON,
            "model": str(model),
            "base": base,
            "data": [{"path": str(pictures), **_CAPTIONS}],
            "adapter": {
                "kind": "lokr",
                "init": "perturbed",
                "targets": [{"layers": layers, "factor": 2} for layers in LIBRE_LAYERS],
            },
            "sigmas": {"law": "beta", "alpha": 2.0, "beta": 2.0, "stratified": True},
            "steps": steps,
            "optimizer": _adamw(1e-3),
            "cache": str(pictures.with_name(f"{pictures.name}-cache")),
            "out": str(out),
        }
    )


def _adamw(rate: float) -> dict[str, Any]:
    return {"kind": "adamw", "learning_rate": rate, "weight_decay": 0.0, "warmup": 20, "schedule": "cosine"}


def schnell(work: Path, callbacks: Callbacks | None = None) -> Path:
    """Distils emoji-schnell from `work/m/base` (or resumes); returns the merged bf16 model, `work/m/schnell`."""
    pictures, model = work / "teach", work / MODELS / "base"
    _pictures(pictures, 3000, 7, lambda scene: True)
    for run in DISTILLATIONS:
        out = work / MODELS / ("schnell" if run == "four" else run)
        if not out.exists():
            adapter = fit(distillation(run, model, pictures, work / "runs" / run), callbacks)
            _merged(model, adapter, out)
        model = out
    return model


def libre(work: Path, callbacks: Callbacks | None = None) -> Path:
    """Sets emoji-schnell free (or resumes); returns the adapter."""
    return set_free("libre", "emoji-schnell", work, callbacks=callbacks)


def set_free(
    run: str, model: str | Path, work: Path, *, steps: int = FREEING_STEPS, callbacks: Callbacks | None = None
) -> Path:
    """Trains `model` by the recipe of emoji-libre on its very pictures (or resumes); returns the adapter."""
    pictures, pool = work / "seen", set(seen_subjects())
    _pictures(
        pictures,
        4500,
        11,
        lambda scene: scene.subject.name in pool and (scene.second is None or scene.second.name in pool),
    )
    return fit(freeing(model, pictures, work / "runs" / run, steps=steps), callbacks)


def random_model(work: Path) -> Path:
    """emoji-base with random weights in its transformer, for a control: `work/m/random`."""
    out = work / MODELS / "random"
    if not out.exists():
        source = open_model("emoji-base")
        torch.manual_seed(0)
        live = LiveParts(transformer=base.make_transformer().bfloat16())
        save_model(out, dataclasses.replace(source.facts, lineage={"name": "random weights"}), live, source)
    return out


def _merged(model_folder: Path, adapter: Path, out: Path) -> None:
    source = open_model(model_folder)
    transformer = source.load_transformer()
    merge(transformer, load_adapter(adapter))
    save_model(out, source.facts, LiveParts(transformer=transformer), source)


def ship(work: Path, name: str) -> Path:
    """Writes emoji-NAME in int8 into the package: "base" with all its parts, the others with their transformers alone.

    Base and schnell are `work/m/NAME`; libre is the shipped schnell with the adapter of `work/runs/libre`, and has
    the files of schnell for what the adapter leaves as it was.
    """
    out = WEIGHTS / f"emoji-{name}"
    fresh = out.with_name(f"{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    if name == "libre":
        source = open_model("emoji-schnell")
        freed = _freed_in_int8(source, work / "runs" / "libre" / "adapter.safetensors")
        save_model(fresh, source.facts, LiveParts(transformer=freed), source)
    else:
        quantise_folder(work / MODELS / name, fresh)
    if name != "base":
        for part in PARTS:
            if part != "transformer":
                shutil.rmtree(fresh / part)
    if name == "libre":
        share_equal(fresh / "transformer", WEIGHTS / "emoji-schnell" / "transformer")
    write_facts(fresh, shipped_facts(read_facts(fresh), name))
    write_all_checksums(fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return out


def _freed_in_int8(source: ModelSource, adapter: Path) -> FluxTransformer2DModel:
    """An int8 model whose adapted layers are merged in fp32 and quantised again; the others keep their bytes."""
    transformer, wide = source.load_transformer(), source.load_transformer(quantise=False).float()
    for layer in merge(wide, load_adapter(adapter)):
        path, _, child = layer.rpartition(".")
        made = quantise(wide.get_submodule(layer), layer)
        made.bias = transformer.get_submodule(layer).bias
        setattr(transformer.get_submodule(path), child, made)
    return transformer


def shipped_facts(facts: Facts, name: str) -> Facts:
    """What a shipped model says of itself."""
    lineage: dict[str, Any] = {"name": f"emoji-{name}"}
    if name == "base":
        kept = {key: value for key, value in facts.lineage.items() if key != "quantised"}
        return dataclasses.replace(facts, lineage={**kept, **lineage, "stored": "int8"})
    if name == "schnell":
        runs = {run: {"distil": spec, "steps": steps} for run, (spec, steps) in DISTILLATIONS.items()}
        lineage |= {"distilled_from": "emoji-base", "runs": runs}
        return dataclasses.replace(facts, steps=4, guidance=1.0, lineage=lineage, parts_from="emoji-base")
    lineage |= {"freed_from": "emoji-schnell", "steps": FREEING_STEPS, "trained_subjects": seen_subjects()}
    return dataclasses.replace(freed(facts), guidance=3.0, lineage=lineage, parts_from="emoji-base")


def _pictures(folder: Path, count: int, seed: int, wanted: Callable[[compose.Scene], bool]) -> None:
    """Composed scenes as a captioned folder, those that are not wanted left out."""
    done = folder.with_suffix(".done")
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    compose.write_folder(folder, count, seed)
    rows = []
    for index, line in enumerate((folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()):
        if wanted(compose.scene(seed, index)):
            rows.append(line)
            continue
        picture = folder / json.loads(line)["file_name"]
        picture.unlink()
        picture.with_suffix(".txt").unlink()
    atomic_write_text(folder / "metadata.jsonl", "\n".join(rows) + "\n")
    done.touch()

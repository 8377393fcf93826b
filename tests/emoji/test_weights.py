"""The shipped weights themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.emoji import compose
from libreflux.emoji.build import students, vae
from libreflux.model.opening import open_model


def test_the_autoencoder_is_good_for_31_db_on_pictures_it_never_saw() -> None:
    shipped = open_model("emoji-base").load_vae(dtype=torch.float32)
    assert vae.psnr(shipped, count=20) > 31


def test_the_family_fits_into_45_megabytes() -> None:
    assert sum(file.stat().st_size for file in students.WEIGHTS.rglob("*") if file.is_file()) < 45e6


def test_students_are_full_rank_fine_tunes_and_libre_has_schnells_files_for_what_it_left_alone() -> None:
    base, schnell, libre = (
        open_model(f"emoji-{name}").load_transformer(quantise=False, dtype=torch.float32)
        for name in ("base", "schnell", "libre")
    )
    shapes = linear_shapes(libre)
    targets = [Target(layers=layers, factor=2) for layers in students.LIBRE_LAYERS]
    freed = resolve(shapes, targets)
    for name, _, _ in shapes:
        taught = schnell.get_submodule(name).weight - base.get_submodule(name).weight
        left = libre.get_submodule(name).weight - schnell.get_submodule(name).weight
        assert torch.linalg.matrix_rank(taught) > min(taught.shape) / 2, name
        assert bool(left.any()) == (name in {layer.name for layer in freed}), name
    (own,) = (students.WEIGHTS / "emoji-libre" / "transformer").glob("*.safetensors")
    assert {name.rpartition(".")[0] for name in load_file(own)} == {layer.name for layer in freed}


def test_no_file_names_a_place_on_the_machine_that_made_it() -> None:
    assert not [file for file in students.WEIGHTS.rglob("*.json") if "_name_or_path" in file.read_text("utf-8")]


def test_libre_has_seen_two_thirds_of_the_subjects_and_says_which() -> None:
    seen = students.seen_subjects()
    assert len(seen) == 113
    assert len(compose.subjects()) == 169
    facts = open_model("emoji-libre").facts
    assert facts.lineage["trained_subjects"] == seen
    assert facts.lineage["freed_from"] == "emoji-schnell"
    assert (facts.steps, facts.guidance) == (28, 3.0)
    assert open_model("emoji-schnell").facts.lineage["distilled_from"] == "emoji-base"


def test_the_recipes_that_made_them_are_valid(tmp_path: Path) -> None:
    for run in students.DISTILLATIONS:
        assert students.distillation(run, "emoji-base", tmp_path, tmp_path / run).objective == "distil"
    assert students.freeing("emoji-schnell", tmp_path, tmp_path / "libre").base == "int8"

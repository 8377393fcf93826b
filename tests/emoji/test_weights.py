"""The shipped weights themselves."""

from __future__ import annotations

import torch

from libreflux.emoji.build import students, vae
from libreflux.model.family import open_model


def test_the_autoencoder_is_good_for_31_db_on_pictures_it_never_saw() -> None:
    shipped = open_model("emoji-base", parts=("vae",), dtype=torch.float32).vae
    assert shipped is not None
    assert vae.psnr(shipped, count=20) > 31


def test_the_family_fits_into_45_megabytes() -> None:
    assert sum(file.stat().st_size for file in students.WEIGHTS.rglob("*") if file.is_file()) < 45e6

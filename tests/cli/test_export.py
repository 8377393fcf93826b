"""`libreflux export`: what it writes, read by us and by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from libreflux.model.family import open_model, read_facts
from libreflux.model.int8 import int8_layers


def test_a_model_goes_to_int8_and_to_diffusers(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert run("export", tiny_model_dir, "--int8", "--out", tmp_path / "small").code == 0
    small = open_model(tmp_path / "small", parts=("transformer",)).transformer
    assert small is not None and int8_layers(small)

    assert run("export", tmp_path / "small", "--for", "diffusers", "--out", tmp_path / "whole").code == 0
    theirs = FluxPipeline.from_pretrained(tmp_path / "whole").transformer
    dense = open_model(tmp_path / "small", parts=("transformer",), quantise=False).transformer
    assert dense is not None
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), dense.parameters(), strict=True))


def test_a_family_that_shares_its_parts_is_whole_for_diffusers(run: Callable, tmp_path: Path) -> None:
    done = run("export", "emoji-libre", "--for", "diffusers", "--out", tmp_path / "libre")
    assert done.code == 0, done.err
    theirs = FluxPipeline.from_pretrained(tmp_path / "libre", torch_dtype=torch.bfloat16)
    assert theirs.transformer.dtype == torch.bfloat16 and theirs.text_encoder_2 is not None
    assert read_facts(tmp_path / "libre").parts_from is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--int8, --for: one of them is needed"),
        (["--int8", "--for", "diffusers"], "--int8, --for: one of them is needed"),
        (["--for", "paint"], "--for: no program 'paint'"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Callable, tiny_model_dir: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = run("export", tiny_model_dir, *options, "--out", tmp_path / "x")
    assert done.code == 2 and message in done.err and not (tmp_path / "x").exists()

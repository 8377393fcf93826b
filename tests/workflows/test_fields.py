"""An option of a picture reaches its record and the pipeline: none is forgotten on the way."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import libreflux
from libreflux.sample.metadata import GenerationRecord
from libreflux.sample.request import DrawRequest
from libreflux.workflows.drawing import DrawingSession, texts_of
from libreflux.workflows.generate_options import GenerateOptions

NOT_OF_A_PICTURE = {
    "prompts",
    "base",
    "comfyui",
    "count",
    "offload",
    "offload_blocks",
    "metadata",
    "out",
    "progress",
    "on_picture",
}
NOT_OF_A_PICTURE |= {"on_notice"}
"""Options that say where the model is, how many pictures there are, or what becomes of them."""
OF_THE_MODEL = {"schema", "model", "quantize", "compile", "dtype", "device", "hashes", "adapters", "versions"}
OF_THE_MODEL |= {"batch", "first_steps_from", "first_steps_guidance"}
"""Fields of a record that say what drew the picture, and beside which others."""
AS_TEXT = {"prompt", "prompt_2", "negative", "negative_2", "max_tokens"}
"""Fields of a record that are encoded before the pipeline is called."""


def names_of(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} - {"_"}


def test_every_option_of_a_picture_is_in_its_record() -> None:
    assert names_of(GenerateOptions) - NOT_OF_A_PICTURE <= names_of(GenerationRecord)


def test_every_given_option_is_what_the_record_says(tiny_model_dir: Path) -> None:
    given: dict[str, Any] = {
        "negative": "a rocket",
        "negative_2": "red",
        "prompt_2": "a tree",
        "guidance": 4.0,
        "guidance_start": 0.25,
        "guidance_stop": 0.75,
        "guidance_rescale": 0.5,
        "sigmas": (1.0, 0.8, 0.5, 0.3),
        "seed": 9,
        "width": 48,
        "height": 32,
        "max_tokens": 4,
        "batch_cfg": True,
        "tile": True,
        "quantize": "int8",
        "guidance_rule": "apg",
        "apg_eta": 0.5,
        "apg_radius": 3.0,
        "apg_momentum": 0.25,
        "nag": 3.0,
        "nag_tau": 2.0,
        "nag_alpha": 0.5,
    }
    other: dict[str, Any] = {
        "no_cfg_until": 1,
        "steps": 3,
        "zero_init": 1,
        "guidance_rule": "cfg-zero",
    }  # beside which a start and a ladder are refused
    default = {
        "model",
        "adapters",
        "device",
        "embedded_guidance",
        "compile",
        "first_steps_from",
        "first_steps_guidance",
    }
    assert names_of(GenerateOptions) - NOT_OF_A_PICTURE == given.keys() | other.keys() | default
    record = libreflux.generate("a fox", model=tiny_model_dir, device="cpu", **given).pictures[0].record
    for name, value in given.items():
        assert getattr(record, name) == (list(value) if name == "sigmas" else value), name
    record = libreflux.generate("a fox", model=tiny_model_dir, device="cpu", guidance=2, **other).pictures[0].record
    assert (record.no_cfg_until, record.steps, record.zero_init) == (1, 3, 1)


OTHERWISE: dict[str, tuple[dict[str, Any], Any]] = {
    "guidance_rule": ({}, "apg"),
    "apg_eta": ({"guidance_rule": "apg"}, 0.5),
    "apg_radius": ({"guidance_rule": "apg"}, 2.0),
    "apg_momentum": ({"guidance_rule": "apg"}, 0.5),
    "zero_init": ({"guidance_rule": "cfg-zero"}, 1),
    "nag_tau": ({"nag": 2.0}, 3.0),
    "nag_alpha": ({"nag": 2.0}, 0.5),
    "below_one": ({"guidance": 0.5}, False),
}
"""Another value of a field, and beside what it means something."""


def unlike(value: Any, kind: Any) -> Any:
    """Another value of this kind."""
    if kind is str or str in typing.get_args(kind):
        return f"{value} otherwise"
    if typing.get_origin(kind) is list or any(typing.get_origin(one) is list for one in typing.get_args(kind)):
        return [0.5]
    return True if kind is bool or bool in typing.get_args(kind) else (value or 0) + 3


@pytest.mark.parametrize("name", sorted(names_of(GenerationRecord) - OF_THE_MODEL))
def test_a_record_that_says_another_thing_draws_another_picture(name: str) -> None:
    record = GenerationRecord(prompt="a fox", seed=1, steps=2, guidance=2.0, width=32, height=32, model="m")
    kind = typing.get_type_hints(GenerationRecord)[name]
    beside, value = OTHERWISE[name] if name in OTHERWISE else ({}, unlike(getattr(record, name), kind))
    record = dataclasses.replace(record, **beside)
    changed = dataclasses.replace(record, **{name: value})
    calls: list[dict[str, Any]] = []

    def pipe(**arguments: Any) -> SimpleNamespace:
        calls.append(arguments)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    texts: Any = {text: text for one in (record, changed) for text in texts_of(one)}
    session = DrawingSession(typing.cast(Any, pipe), texts, typing.cast(Any, None), torch.device("cpu"), "float32", {})
    for one in (record, changed):
        session.draw(one)
    first, second = calls
    assert first.keys() == second.keys()
    assert first.keys() <= names_of(DrawRequest)
    assert first != second
    if name not in AS_TEXT:
        differing = [key for key in first if first[key] != second[key]]
        assert len(differing) == (2 if name == "below_one" else 1)  # no scale, and no negative prompt

"""What Python callers pass by mistake: one line, before any work and before torch is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import libreflux
from libreflux.errors import LibrefluxError, OptionError
from libreflux.recipe import Recipe
from libreflux.workflows.argument_types import check_types
from libreflux.workflows.demo import DemoOptions
from libreflux.workflows.demo_data import DemoDataOptions
from libreflux.workflows.generate_options import GenerateOptions
from libreflux.workflows.grid import GridOptions
from libreflux.workflows.prepare import PrepareOptions
from libreflux.workflows.probe_options import ProbeOptions
from libreflux.workflows.progress import silent
from libreflux.workflows.remake import RemakeOptions
from libreflux.workflows.train import TrainOptions

WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("generate", ("a fox",), {"device": None}, "device: cannot be None; hint: give a text"),
    ("generate", (3,), {}, "prompts: cannot be 3; hint: give a text or a list of texts"),
    ("generate", ("a fox",), {"model": 3}, "model: cannot be 3; hint: give a text, a path or None"),
    (
        "generate",
        ("a fox",),
        {"adapters": 3},
        "adapters: cannot be 3; hint: give a text, a path or a list of paths",
    ),
    ("generate", ("a fox",), {"adapters": ["a", 3]}, "adapters: cannot be 3; hint: give a text or a path"),
    ("generate", ("a fox",), {"steps": "4"}, "steps: cannot be '4'; hint: give a whole number or None"),
    ("generate", ("a fox",), {"guidance_start": None}, "guidance_start: cannot be None; hint: give a number"),
    ("generate", ("a fox",), {"progress": None}, "progress: cannot be None; hint: give a function"),
    ("generate", ("a fox",), {"metadata": "no"}, "metadata: cannot be 'no'; hint: give True or False"),
    ("grid", ("a fox",), {"out": None}, "out: cannot be None; hint: give a text or a path"),
    ("grid", ("a fox",), {"seeds": None}, "seeds: cannot be None; hint: give a list of numbers"),
    ("remake", (3,), {}, "picture: cannot be 3; hint: give a text or a path"),
    ("train", (None,), {}, "recipe: cannot be None; hint: give a recipe, a path, a text or a mapping"),
    ("train", ("r.yaml",), {"overrides": [3]}, "overrides: cannot be 3; hint: give a text"),
    ("train", ("r.yaml",), {"fork": "yes"}, "fork: cannot be 'yes'; hint: give True or False"),
    ("dry_run", ([1],), {}, "recipe: cannot be [1]; hint: give a recipe, a path, a text or a mapping"),
    ("prepare", (3,), {}, "data: cannot be 3; hint: give a recipe, a path, a text, a mapping or a list of paths"),
    ("prepare", ("x",), {"resolution": "x"}, "resolution: cannot be 'x'; hint: give a list of numbers or None"),
    ("prepare", ("x",), {"shard": 3}, "shard: cannot be 3; hint: give a text or None"),
    ("average", ("x",), {"out": 3}, "out: cannot be 3; hint: give a path or a text"),
    ("average", ("x",), {"out": "a", "width": "x"}, "width: cannot be 'x'; hint: give a number or None"),
    ("sweep", (3,), {}, "run: cannot be 3; hint: give a path or a text"),
    ("sweep", ("x",), {"lerps": None}, "lerps: cannot be None; hint: give a list of numbers"),
    ("sweep", ("x",), {"by": 3}, "by: cannot be 3; hint: give a text"),
    ("merge", ("m", 3), {"out": "o"}, "adapters: cannot be 3; hint: give a text, a path or a list of paths"),
    ("export", ("m",), {"out": "o", "rank": "4"}, "rank: cannot be '4'; hint: give a whole number or None"),
    ("probe", ("m",), {"pictures": "x"}, "pictures: cannot be 'x'; hint: give a whole number or None"),
    ("probe", ("m",), {"against": 3}, "against: cannot be 3; hint: give a text or None"),
    ("demo_data", ("d",), {"seed": 1.5}, "seed: cannot be 1.5; hint: use a whole number from 0"),
    ("demo", ("d",), {"pictures": 40.5}, "pictures: cannot be 40.5; hint: use a whole number from 32"),
    ("demo", ("d",), {"pictures": None}, "pictures: cannot be None; hint: give a whole number"),
    ("generate", ("a fox",), {"device": Path("cpu")}, "device: cannot be PosixPath('cpu'); hint: give a text"),
    (
        "train",
        ("r.yaml",),
        {"overrides": Path("a=b")},
        "overrides: cannot be PosixPath('a=b'); hint: give a list of texts",
    ),
    (
        "average",
        ("x",),
        {"out": "a", "width": np.array([0.1, 0.2])},
        "width: cannot be [0.1, 0.2]; hint: give a number or None",
    ),
    ("load_adapter", (3,), {}, "path: cannot be 3; hint: give a path"),
    ("load_adapter", ("a\0b",), {}, r"path: cannot be 'a\x00b'; hint: give a path"),
    ("load_adapter", ("",), {}, "path: cannot be ''; hint: give a path"),
    ("open_model", (3,), {}, "no such model: 3"),
    ("open_model", ("~nobody-of-this-name/model",), {}, "no such model: ~nobody-of-this-name/model"),
]


@pytest.mark.parametrize(("name", "given", "named", "told"), WRONG)
def test_what_is_of_no_type_that_is_taken_is_one_line(
    name: str, given: Any, named: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LibrefluxError) as refusal:
        getattr(libreflux, name)(*given, **named)
    assert str(refusal.value) == told or str(refusal.value).startswith(f"{told}; hint: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", [None, 1.5, "nowhere"])
def test_a_pipeline_on_no_device_is_one_line(tiny_model_dir: Path, device: Any) -> None:
    with pytest.raises(LibrefluxError, match=f"^device: {device!r} is no device; hint: use auto, cpu"):
        libreflux.LibreFluxPipeline.from_pretrained(tiny_model_dir, device=device)


def test_it_is_refused_before_torch_is_there() -> None:
    code = """if True:
        import sys, libreflux
        for name, given in (("generate", "x"), ("grid", "x"), ("train", None), ("prepare", 3), ("load_adapter", 3)):
            try:
                getattr(libreflux, name)(given, **({"device": None} if given == "x" else {}))
            except libreflux.errors.LibrefluxError as error:
                assert "torch" not in sys.modules, error
            else:
                raise AssertionError(name)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RECIPE = {"model": "m", "data": [{"path": "d"}], "resolution": 32, "steps": 1, "out": "o"}
TAKEN: list[tuple[Any, Any, dict[str, Any]]] = [
    (GenerateOptions, "a", {"guidance": np.float32(3), "steps": np.int64(4), "seed": torch.tensor(3)}),
    (GenerateOptions, ("a", "b"), {"model": Path("m"), "adapters": [Path("a"), "b:0.5"], "guidance": Fraction(7, 2)}),
    (GenerateOptions, np.array(["a"]), {"sigmas": np.array([1.0, 0.5]), "out": Path("o"), "on_picture": print}),
    (GridOptions, "a", {"model": ["m", Path("n")], "guidance": 3, "steps": "1:3", "seeds": range(3)}),
    (RemakeOptions, Path("a.png"), {"adapters": "a", "progress": silent}),
    (TrainOptions, Recipe.model_validate(RECIPE), {"overrides": "steps=2"}),
    (TrainOptions, RECIPE, {"overrides": (one for one in ("steps=2",))}),
    (PrepareOptions, [Path("a"), "b"], {"resolution": 64, "crop": "square"}),
    (PrepareOptions, Recipe.model_validate(RECIPE), {"resolution": np.array([64]), "on_source": print}),
    (ProbeOptions, "m", {"adapters": [Path("a")], "data": Path("d")}),
    (DemoOptions, "d", {}),
    (DemoDataOptions, "d", {"count": np.int32(3), "pairs": 1}),
]


@pytest.mark.parametrize(("kind", "first", "named"), TAKEN)
def test_what_was_taken_is_taken(kind: Any, first: Any, named: dict[str, Any]) -> None:
    options = kind(first, **named)
    check_types(options)
    assert list(getattr(options, "overrides", ["steps=2"])) in (["steps=2"], list("steps=2"))  # not used up


def test_a_device_of_torchs_is_a_device(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def refused(*given: Any, **named: Any) -> Any:
        seen.append(given[2])
        raise OptionError("seen", "device")

    monkeypatch.setattr("libreflux.workflows.drawing.open_for_drawing", refused)
    draw: Callable[..., Any] = libreflux.generate
    with pytest.raises(OptionError, match="seen"):
        draw("a fox", model=tiny_model_dir, device=torch.device("cpu"))
    assert seen == ["cpu"]

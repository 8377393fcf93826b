"""What `generate` and `grid` refuse, in the words of Python and of the command, and before torch is loaded."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import libreflux
from libreflux.cli import main
from libreflux.errors import LibrefluxError, OptionError


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompts": []}, "prompts: nothing to draw; hint: give one prompt or several"),
        ({"prompts": ["x", 3]}, "prompts: cannot be 3; hint: give a text"),
        ({"negative": None}, "negative: cannot be None; hint: give a text"),
        ({"prompt_2": [None]}, "prompt_2: cannot be None; hint: give a text"),
        ({"prompt_2": ["a", "b"]}, "prompt_2: 2 for 1 prompt; hint: give one for each `prompts`"),
        ({"seed": -1}, "seed: cannot be -1; hint: use a whole number from 0"),
        ({"count": 0}, "count: cannot be 0; hint: use a whole number from 1 to 100000"),
        ({"count": True}, "count: cannot be True; hint: use a whole number from 1 to 100000"),
        ({"width": 100}, "width: 100 is not a multiple of 16; hint: use 96"),
        ({"height": 64.5}, "height: cannot be 64.5; hint: use a multiple of 16, at most 16384"),
        ({"steps": 0}, "steps: cannot be 0; hint: use 1 to 10000"),
        ({"guidance": float("nan")}, "guidance: cannot be nan; hint: use 0 or more; 0 and 1 are no guidance"),
        ({"guidance": 1, "negative": "y"}, "negative: has no effect at guidance 1; hint: add `guidance` 3, or remove"),
        ({"guidance": 1, "batch_cfg": False}, "batch_cfg: has no effect at guidance 1"),
        ({"batch_cfg": "on"}, "batch_cfg: cannot be 'on'"),
        ({"sigmas": [1, 0.5], "steps": 2}, "steps: has no effect beside `sigmas`; hint: give one of them"),
        ({"sigmas": []}, "sigmas: cannot be \\[\\]"),
        ({"steps": 4, "no_cfg_until": 4}, "no_cfg_until: leaves no step of 4 guided; hint: use at most 3, or `guid"),
        ({"no_cfg_until": 1, "guidance_start": 0.5}, "no_cfg_until: does what `guidance_start` does"),
        ({"offload": "gpu"}, "offload: cannot be 'gpu'; hint: use one of auto, none, model, sequential"),
        ({"quantize": "int4"}, "quantize: cannot be 'int4'; hint: use one of int8, w8a8"),
        ({"base": "x"}, "base: has no effect without a single file"),
    ],
    ids=str,
)
def test_a_refusal_names_the_option_as_python_has_it(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"^{told}"):
        libreflux.generate(**dict[str, Any](prompts="x", out=tmp_path / "new" / "x.png") | given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"guidance": "x"}, "guidance: 'x' is no list of numbers; hint: write 1,3.5 or 1:6:1"),
        ({"guidance": []}, "guidance: cannot be \\(\\); hint: give a list"),
        ({"guidance": [1, 1.0]}, "guidance: has 1 twice"),
        ({"guidance": [-1]}, "guidance: cannot be -1"),
        ({"steps": [1.5]}, "steps: cannot be 1.5"),
        ({"steps": [None]}, "steps: cannot be None"),
        ({"seeds": None}, "seeds: cannot be None"),
        ({"seeds": [-1]}, "seeds: cannot be -1"),
        ({"prompts": ()}, "prompts: nothing to draw"),
        ({"prompts": "a \ud83d"}, r"prompts: half a character in 'a \\ud83d'; hint: write it as UTF-8"),
        ({"offload": "gpu"}, "offload: cannot be 'gpu'"),
    ],
    ids=str,
)
def test_a_grids_refusal_too(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"^{told}"):
        libreflux.grid(**dict[str, Any](prompts="x", out=tmp_path / "grid") | given)
    assert not list(tmp_path.iterdir())


def test_a_command_spells_the_hint_of_any_error_as_it_is_typed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from libreflux.workflows.drawing import LibreFluxPipeline

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(LibreFluxPipeline, "__call__", no_memory)
    told = r"out of memory; hint: a smaller `width` and `height`, `quantize` int8, `offload` model"
    with pytest.raises(LibrefluxError, match=told):
        libreflux.generate("x", model=tiny_model_dir)
    err = io.StringIO()
    words = ["libreflux", "generate", "x", "--model", str(tiny_model_dir), "--out", str(tmp_path / "x.png")]
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stderr(err), pytest.raises(SystemExit):
        main()
    assert "hint: a smaller --width and --height, --quantize int8, --offload model" in err.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "x", "--guidance", "nan"],
        ["generate", "x", "--guidance", "1", "--negative", "y"],
        ["generate", "x", "--sigmas", "0.5,0.75"],
        ["generate", "x", "--steps", "4", "--no-cfg-until", "4"],
        ["generate", "x", "--width", "100000"],
        ["generate", "x", "--out", "x.gif"],
        ["generate", "--remake", "x.png", "--seed", "1"],
        ["grid", "x", "--steps", "0"],
        ["grid", "x", "--width", "100"],
    ],
    ids=" ".join,
)
def test_what_is_typed_wrong_is_refused_before_torch_is_loaded(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, json; sys.argv[1:] = json.loads(sys.argv[1])\nfrom libreflux.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 2, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("libreflux: error: "), done.stderr
    assert not list(tmp_path.iterdir())


def test_the_names_of_the_package_load_no_torch() -> None:
    code = "import sys, libreflux; libreflux.generate, libreflux.grid; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Every verb tries the place of its result before it looks at what it would work on.

What it would work on does not exist in these cases: a verb that began with the work would say so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from rights import bound_by_modes

GONE = "no/such/thing"
FILE, FOLDER, NEW = "a file", "a folder", "new"
FEW = ["--adapter", GONE, "--data", GONE, "--prompts", GONE]
VERBS: dict[str, tuple[str, list[str]]] = {
    "generate": (FILE, ["generate", "x", "--model", GONE, "--out", "PLACE.png"]),
    "generate into a folder": (FOLDER, ["generate", "x", "y", "--model", GONE, "--out", "PLACE"]),
    "remake": (FILE, ["generate", "--remake", "told.png", "--out", "PLACE.png"]),
    "grid": (FOLDER, ["grid", "x", "--model", GONE, "--out", "PLACE"]),
    "merge": (NEW, ["merge", GONE, f"{GONE}.safetensors", "--out", "PLACE"]),
    "export": (NEW, ["export", GONE, "--int8", "--out", "PLACE"]),
    "export of an adapter": (NEW, ["export", "ADAPTER", "--for", "comfyui", "--out", "PLACE.safetensors"]),
    "diff": (NEW, ["diff", GONE, GONE, "--rank", "1", "--out", "PLACE.safetensors"]),
    "inspect layers": (FOLDER, ["inspect", "layers", GONE, "--out", "PLACE"]),
    "average": (NEW, ["average", GONE, "--width", "0.1", "--out", "PLACE.safetensors"]),
    "average --sweep": (FOLDER, ["average", GONE, "--sweep", "--report", "PLACE"]),
    "best of a sweep": (NEW, ["average", GONE, "--sweep", "--report", "r", "--out", "PLACE.safetensors"]),
    "probe": (FOLDER, ["probe", GONE, "--out", "PLACE"]),
    "probe --csv": (FILE, ["probe", GONE, "--csv", "PLACE.csv"]),
    "probe --against": (FOLDER, ["probe", GONE, "--against", GONE, "--out", "PLACE"]),
    "probe --few-steps": (FOLDER, ["probe", GONE, "--few-steps", *FEW, "--out", "PLACE"]),
    "csv of few steps": (FILE, ["probe", GONE, "--few-steps", *FEW, "--out", "r", "--csv", "PLACE.csv"]),
    "inspect attention": (FOLDER, ["inspect", "attention", GONE, "x", "--out", "PLACE"]),
    "train": (FOLDER, ["train", "r.yaml", "out=PLACE"]),
    "prepare": (FOLDER, ["prepare", GONE, "--model", GONE, "--out", "PLACE"]),
    "demo": (FOLDER, ["demo", "--out", "PLACE"]),
    "caption": (FILE, ["caption", ".", "--model", GONE, "--page", "PLACE"]),
    "demo-data": (NEW, ["demo-data", "PLACE"]),
}
RECIPE = f"""\
model: {GONE}
data: [{{path: {GONE}}}]
resolution: 32
adapter: {{targets: [{{layers: "transformer_blocks.*.attn.**", factor: 4}}]}}
steps: 3
out: o
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    values = {"schema": 1, "prompt": "a", "seed": 1, "steps": 1, "guidance": 1.0, "width": 32, "height": 32}
    info = PngInfo()
    info.add_text("libreflux", json.dumps(values | {"model": GONE}))
    Image.new("RGB", (32, 32)).save(tmp_path / "told.png", pnginfo=info)
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    for kind in ("cells", "sections", "checkpoints", "samples"):
        (tmp_path / f"half-{kind}").mkdir()
        (tmp_path / f"half-{kind}" / kind).mkdir(mode=0o555)
    return tmp_path


def told_of(folder: Path) -> list[tuple[Path, int]]:
    """Every file and its time; but for the lock that stays in a run folder."""
    kept = (path for path in sorted(folder.rglob("*")) if not path.is_dir() and path.name != ".lock")
    return [(path, path.lstat().st_mtime_ns) for path in kept]


def case(verb: str, name: str, told: str) -> object:
    return pytest.param(verb, name, told, id=f"{verb}: {name}")


CASES = [
    *(case(verb, "locked/x", "locked/x") for verb in VERBS),
    *(case(verb, "locked/a/b", "locked/a/b") for verb in VERBS),
    *(case(verb, "file/x", "file") for verb in VERBS),
    *(case(verb, "dangling/x", "dangling") for verb in VERBS),
    *(case(verb, "locked", "locked") for verb, (kind, _) in VERBS.items() if kind == FOLDER),
    *(case(verb, "file", "file") for verb, (kind, _) in VERBS.items() if kind == FOLDER),
    *(case(verb, "dangling", "dangling") for verb, (kind, _) in VERBS.items() if kind == FOLDER),
    *(case(verb, "dangling", "dangling") for verb in ("merge", "export", "demo-data")),
    case("grid", "half-cells", "half-cells/cells"),
    case("probe", "half-sections", "half-sections/sections"),
    case("probe --against", "half-sections", "half-sections/sections"),
    case("train", "half-checkpoints", "half-checkpoints/checkpoints"),
    case("train", "half-samples", "half-samples/samples"),
]


@pytest.mark.parametrize(("verb", "name", "told"), CASES)
def test_a_place_that_cannot_be_written_is_refused_first(
    run: Callable, place: Path, verb: str, name: str, told: str
) -> None:
    adapter = place / "told.safetensors"
    save_file({"x.lora_A.weight": torch.zeros(1)}, adapter)
    before = told_of(place)
    words = [word.replace("PLACE", name).replace("ADAPTER", adapter.name) for word in VERBS[verb][1]]
    with bound_by_modes():
        result = run(*words)
    lines = result.err.splitlines()
    assert (result.code, result.out, len(lines)) == (2, "", 1), result.err
    assert lines[0].startswith("libreflux: error: ")
    assert "; hint: " in lines[0]
    assert told in lines[0]
    assert GONE not in lines[0], "the work came first"
    assert told_of(place) == before


@pytest.mark.parametrize("verb", [verb for verb, (kind, _) in VERBS.items() if verb not in ("demo", "demo-data")])
def test_in_a_good_place_the_work_is_looked_at(run: Callable, place: Path, verb: str) -> None:
    """The cases above can fail: what is missing is named where the place is not at fault."""
    words = [word.replace("PLACE", "good").replace("ADAPTER", "lost.safetensors") for word in VERBS[verb][1]]
    save_file({"x.lora_A.weight": torch.zeros(1)}, place / "lost.safetensors")
    result = run(*words)
    assert result.code == 2, result.err
    assert GONE in result.err or "lost.safetensors: " in result.err, result.err
    assert not [path for path in place.glob("good*") if not path.is_dir()]
    assert not [*place.rglob(".trial*")]
    assert not os.path.lexists(place / "nowhere")

"""The README's path for a user's own pictures, its commands as they stand there; and runs that are not finished."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from libreflux.emoji import compose
from libreflux.sample.metadata import read_record

README = Path(__file__).parent.parent.parent / "README.md"
FLUX = "black-forest-labs/FLUX.1-schnell"
SMALL = ("--width", 64, "--height", 64)
FEWER: dict[str, list[object]] = {
    "train": ["steps=2", "batch=2", "save.every=1"],
    "generate": ["--steps", 2, *SMALL],
    "average": [],
    "merge": [],
    "grid": ["--steps", 2, "--guidance", "1,3", "--seeds", 0, *SMALL],
}
SWEEP: list[object] = ["--pictures", 4, "--sigmas", "0.5", "--lerps", "0.5", "--widths", "0.1", "--guidance", "1"]


@pytest.fixture(scope="module")
def place(run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Twenty pictures in `photos`, and everything that the README then does, on the emoji family in FLUX.1's place."""
    section = README.read_text("utf-8").partition("## Your own pictures")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(yaml|sh)\n(.*?)```", section, re.DOTALL))
    folder = tmp_path_factory.mktemp("user")
    compose.write_folder(folder / "photos", 20, 1)
    compose.write_folder(folder / "photos-apart", 4, 2)
    assert FLUX in blocks["yaml"]
    assert "resolution: 512" in blocks["yaml"]
    (folder / "mine.yaml").write_text(blocks["yaml"].replace(FLUX, "emoji-base").replace("512", "64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in blocks["sh"].splitlines():
            program, verb, *rest = shlex.split(line.replace(FLUX, "emoji-base"), comments=True)
            fewer = [*SWEEP, "--steps", 1] if "--sweep" in rest else FEWER[verb]
            done = run(verb, *rest, *fewer)
            assert (program, done.code) == ("libreflux", 0), done.err
        yield folder


def _draw(run: Callable, adapter: object, out: Path) -> bytes:
    done = run("generate", "a fox", "--adapter", adapter, "--steps", 1, *SMALL, "--out", out)
    assert done.code == 0, done.err
    with Image.open(out) as image:
        return image.tobytes()


def test_the_readmes_commands_draw_with_what_was_trained(place: Path) -> None:
    [adapter] = read_record(place / "fox.png").adapters
    assert adapter["file"] == "adapter.safetensors"
    assert adapter["weight"] == 1.0
    merged = next((place / "out").glob("*.png"))
    assert read_record(merged).hashes != read_record(place / "fox.png").hashes


def test_a_run_folder_is_its_result_or_its_newest_whole_checkpoint(
    run: Callable, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, out = place / "runs" / "mine", place / "a.png"
    first, second = (mine / f"checkpoints/step-0000000{step}/adapter.safetensors" for step in (1, 2))
    result = mine / "adapter.safetensors"
    after_1, after_2 = (_draw(run, file, out) for file in (first, second))
    assert after_1 != after_2
    assert _draw(run, mine, out) == _draw(run, result, out) == after_2
    assert not caplog.records

    whole = result.read_bytes()
    result.unlink()
    assert _draw(run, "runs/mine", out) == after_2
    assert "runs/mine is not finished: its adapter after step 2 is taken" in caplog.text
    second.write_bytes(whole[:-9])
    assert _draw(run, mine, out) == after_1
    assert "step-00000002 is not used" in caplog.text
    assert "after step 1 is taken" in caplog.text

    result.write_bytes(first.read_bytes())  # a run that was prolonged after its result, and stopped
    second.write_bytes(whole)
    assert _draw(run, mine, out) == after_2


def test_folders_without_an_adapter_are_refused(run: Callable, place: Path) -> None:
    for command in (["generate", "a fox", "--adapter", "photos:0.5"], ["merge", "emoji-base", "photos", "--out", "m"]):
        refused = run(*command)
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert "photos: no adapter.safetensors and no checkpoint in this folder; hint: name a run folder" in refused.err

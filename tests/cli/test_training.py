"""What a run shows of itself: the line on the terminal, TensorBoard's event files; and --fork through the command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from libreflux.recipe import load_recipe
from libreflux.training.callbacks import StepInfo
from libreflux.training.loop import fit
from libreflux.workflows.run_record import RunRecorder


class Broken(RunRecorder):
    """Dies in step 3, after its numbers are on the board and before a checkpoint."""

    def on_step(self, info: StepInfo) -> None:
        super().on_step(info)
        if info.step == 3:
            raise KeyboardInterrupt


def test_the_board_shows_every_step_once_though_one_was_trained_twice(
    run: Callable, recipe: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    changes = [f"out={out}", "steps=5", "tensorboard=true", "samples.every=2", "samples.guidance=[1]"]
    told = load_recipe(recipe, changes)
    with pytest.raises(KeyboardInterrupt), Broken(told) as shown:
        fit(told, shown)
    done = run("train", recipe, *changes)
    assert done.code == 0, done.err
    assert re.search(r"training: 5/5, .* loss [\d.]+, gradient [\d.e-]+, [\d.e+]+ pictures/s, [\d.]+ GB\n", done.err)

    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "gradient_norm", "learning_rate"):
        shown_values = [(event.step, event.value) for event in board.Scalars(name)]
        assert shown_values == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert [event.value for event in board.Scalars("sigma_mean/rank0")] == pytest.approx(
        [line["sigma_mean"][0] for line in lines], rel=1e-6
    )
    assert [event.value for event in board.Scalars("skipped")] == [0.0] * 5
    assert [event.step for event in board.Images("samples")] == [2, 4]
    assert board.Images("samples")[-1].encoded_image_string[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_adversarys_losses_are_told(run: Callable, recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    student = ["objective=distil", "distil={steps: 4, adversarial: {width: 8}}", "samples.every=0"]
    done = run("train", recipe, f"out={out}", "steps=2", "tensorboard=true", *student)
    assert done.code == 0, done.err
    assert re.search(r"training: 2/2, .* loss -?[\d.]+, discriminator [12]\.\d+, gradient ", done.err)
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("discriminator_loss", "adversarial_loss", "heads_gradient_norm"):
        values = [event.value for event in board.Scalars(f"adversary/{name}")]
        assert values == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_the_parts_of_a_loss_are_told(run: Callable, recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, keys = tmp_path / "run", ["guided_target.scale=3", "hold_base.weight=0.2", "samples.every=0"]
    done = run("train", recipe, f"out={out}", "steps=2", "tensorboard=true", *keys)
    assert done.code == 0, done.err
    told = r"training: 2/2, .* loss [\d.]+, plain [\d.]+, guided [\d.]+, held [\d.]+, gradient "
    assert re.search(told, done.err)
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("plain_loss", "guided_loss", "hold_base_loss"):
        values = [event.value for event in board.Scalars(f"parts/{name}")]
        assert values == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["guided_loss"] + 0.2 * line["hold_base_loss"] for line in lines]
    )


def test_without_tensorboard_it_is_refused_before_anything_is_done(
    run: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    refused = run("train", recipe, f"out={tmp_path / 'run'}", "tensorboard=true")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "TensorBoard is not installed; hint: pip install 'libreflux[tensorboard]'" in refused.err
    assert not (tmp_path / "run").exists()


def test_fork_through_the_command(run: Callable, recipe: Path, tmp_path: Path) -> None:
    common = ["train", recipe, f"out={tmp_path / 'run'}", "samples.every=0"]
    assert run(*common, "steps=1").code == 0
    refused = run(*common, "steps=2", "batch=1")
    assert refused.code == 2
    assert "batch (2 -> 1)" in refused.err
    assert "--fork" in refused.err
    assert run(*common, "steps=2", "batch=1", "--fork").code == 0
    again = run(*common, "steps=3", "batch=1")
    assert again.code == 0
    assert "resumes after step 2" in again.err


def test_a_run_that_only_skips_exits_with_2_and_one_line(run: Callable, recipe: Path, tmp_path: Path) -> None:
    from tiny import poison_latents

    common = ["train", recipe, f"out={tmp_path / 'run'}", "samples.every=0", "save.every=1"]
    assert run(*common, "steps=1").code == 0
    [poisoned, *_] = poison_latents(tmp_path / "run" / "cache")
    stopped = run(*common, "steps=9", "max_skipped=2")
    [line] = [line for line in stopped.err.splitlines() if line.startswith("libreflux: error: ")]
    assert stopped.code == 2
    assert "2 steps in a row up to step 3" in line
    assert "hint" in line
    assert "1 skipped" in stopped.err or poisoned in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_start_up_tells_what_each_source_holds(run: Callable, recipe: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "10_cat").mkdir()
    Image.new("RGB", (64, 32), "red").save(tmp_path / "10_cat" / "a.jfif")
    (tmp_path / "10_cat" / "a.caption").write_text("a red cat, кот")
    changes = [f"data.0.path={tmp_path}", "data.0.weight=0.03", f"out={tmp_path / 'run'}", f"cache={tmp_path / 'c'}"]
    for resumed in (False, True):
        done = run("train", recipe, *changes, f"steps={2 + resumed}")
        assert done.code == 0, done.err
        left_out = "left out: c, run, " if resumed else ""
        assert (
            f"{tmp_path}: 1 picture, 1 caption (.caption 1), {left_out}10_cat shown 10 times an epoch, "
            "0.3 shown an epoch, 50% of the pixels cropped off (50% of a.jfif) a.jfif: 'a red cat, кот'"
        ) in " ".join(done.err.split())
        assert "1 step an epoch" in done.err
        assert "nan" not in done.err
    prepared = run("prepare", tmp_path, "--out", tmp_path / "other", "--resolution", 64)
    assert prepared.code == 0
    assert "1 picture, 1 caption (.caption 1)" in " ".join(prepared.err.split())
    planned = run("train", recipe, *changes, "--dry-run")
    assert "an epoch shows 0.3: " in " ".join(planned.out.split())

"""`libreflux train` as a user runs it: what a dry run says of memory, time and disk, and what a run leaves."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image


def test_a_dry_run_says_first_whether_it_fits_and_the_rest_on_request(
    run: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = ("train", recipe, "--dry-run", f"out={tmp_path / 'o'}", "optimizer.learning_rate=3e-4")
    short, layers, whole = (run(*command, *more) for more in ((), ("--layers",), ("--all",)))
    assert [each.code for each in (short, layers, whole)] == [0, 0, 0]
    lines = short.out.splitlines()
    assert lines[0].startswith("fits: at its peak (")
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80
    text = " ".join(short.out.split())
    assert "GiB, this machine's memory time: known only after the first steps" in text
    assert "memory at its peak" in text
    assert "512 tokens" in text
    assert "3 steps of 2 pictures on each device; an epoch shows 5: 1.2 epochs" in text
    assert "checkpoints, 2 and one being written" in text
    assert "cache of 5 pictures" in text
    assert "free in" in text
    assert lines[-1] == "--layers lists the adapted layers, --all adds them and the resolved recipe"
    _, found, table = layers.out.partition("\nlayer ")
    assert found
    assert "transformer_blocks.0.attn.to_q" in table
    assert "total" in table
    assert "norm1" not in table
    assert max(map(len, layers.out.splitlines())) <= 80
    assert "schema: 1" not in layers.out
    told, _, resolved = whole.out.partition("schema: 1\n")
    assert told.startswith(short.out.partition("\n--layers")[0])
    assert f"\nlayer {table.rstrip()}" in told
    assert yaml.safe_load(resolved)["optimizer"]["learning_rate"] == 3e-4
    assert not (tmp_path / "o").exists()
    refused = run("train", recipe, "--all")
    assert refused.code == 2
    assert "--all: has no effect without --dry-run" in refused.err


@pytest.mark.parametrize(
    ("on_cpu", "total", "card", "told"),
    [
        (True, 1, None, "fits: at its peak (training) "),
        (True, 10**6, None, "does not fit: at its peak (training) 1,000,"),
        (True, 10**6, 20, "on a card: at its peak (training) 23."),
        (False, 20, None, "for a card: at its peak (training) 23."),
        (False, 10**6, None, "more than one card has"),
    ],
)
def test_the_verdict_is_of_the_device_or_of_the_card_that_it_wants(
    recipe: Path, on_cpu: bool, total: int, card: int | None, told: str
) -> None:
    from libreflux.recipe import load_recipe
    from libreflux.training.phases import Estimate
    from libreflux.workflows.memory_verdict import verdict

    def of(gib: int, on_cpu: bool) -> Estimate:
        rest: dict[str, Any] = dict.fromkeys(
            ("adapter", "moments", "gradient", "activations", "update", "averages", "checkpoint"), 0
        )
        return Estimate(on_cpu=on_cpu, weights=gib * 2**30, **rest)

    lines = verdict(load_recipe(recipe), of(total, on_cpu), None if card is None else of(card, False)).lines()
    assert told in lines[0]
    assert ("hint: try, in this order, gradient_checkpointing: true" in lines[0]) == lines[0].startswith("does not fit")
    assert ("one of 24 GB holds it" in lines[0]) == (card == 20 or total == 20)
    assert [line.startswith("without one: does not fit") for line in lines[1:]] == ([] if card is None else [True])


@pytest.mark.parametrize(
    ("device", "gib", "told"),
    [
        ("auto", 24, "fits: at its peak (training) 23."),
        ("cuda:1", 21, "may fit: at its peak (training) 23."),
        ("cuda", 6, "does not fit: at its peak (training) 23."),
        ("cuda:2", 24, "for a card: at its peak (training) 23."),
        ("mps", 24, "for a card: at its peak (training) 23."),
    ],
)
def test_the_verdict_on_a_card(recipe: Path, monkeypatch: pytest.MonkeyPatch, device: str, gib: int, told: str) -> None:
    from types import SimpleNamespace

    import torch

    from libreflux.recipe import load_recipe
    from libreflux.training.phases import Estimate
    from libreflux.workflows.memory_verdict import verdict

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
    rest: dict[str, Any] = dict.fromkeys(
        ("adapter", "moments", "gradient", "activations", "update", "averages", "checkpoint"), 0
    )
    found = Estimate(on_cpu=False, weights=20 * 2**30, **rest)
    (line,) = verdict(load_recipe(recipe, [f"device={device}"]), found).lines()
    assert line.startswith(told)
    assert ("this card's" in line) == (device in ("auto", "cuda", "cuda:1"))
    assert ("hint: try, in this order" in line) == line.startswith("does not fit")


def test_dry_run_tells_the_time_left_from_the_runs_own_rate_and_a_disk_that_is_too_small(
    run: Callable, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "o").mkdir()
    rows = [{"step": step, "pictures_per_second": 4.0} for step in (1, 2)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 3, "pict'
    (tmp_path / "o" / "metrics.jsonl").write_text(text)
    changes = (f"out={tmp_path / 'o'}", "steps=1802", "data.0.path=nowhere")
    table = run("train", recipe, "--dry-run", *changes).out
    assert "time: 15:00 for the steps after 2, at the 4 pictures/s of the last 2 steps" in table
    assert "the cache comes on top: nowhere: no such folder" in table
    assert "too little" not in table
    (tmp_path / "o" / "recipe.json").write_text('{"world": 2}')  # the rate is of both, the steps left are of each
    assert "time: 30:00 for the steps after 2" in run("train", recipe, "--dry-run", *changes).out
    endless = (*changes, "save.keep=1000000000", "save.every=1", "steps=1000000000")
    told = " ".join(run("train", recipe, "--dry-run", *endless).out.split())
    assert "lower save.keep, or set out or cache elsewhere" in told
    refused = run("train", recipe, "--dry-run", *endless[:2], *endless[3:])
    assert "lower save.keep" in " ".join(refused.out.split())  # the whole report comes first
    assert refused.code == 2
    [line] = [line for line in refused.err.splitlines() if line.startswith("libreflux: error: ")]
    assert line.endswith(": too little is free; hint: lower save.keep, or set out or cache elsewhere")


@pytest.mark.parametrize(
    ("visits", "told"), [(47.5, "47.5: "), (47.0, "47: "), (1234.56, "1,234.6: "), (9.75, "9.75: "), (0.3, "0.3: ")]
)
def test_a_dry_run_says_how_many_pictures_an_epoch_shows(recipe: Path, visits: float, told: str) -> None:
    from libreflux.data.forecast import Forecast
    from libreflux.recipe import load_recipe
    from libreflux.workflows.dry_run import steps_line

    line = steps_line(load_recipe(recipe), Forecast(pictures=5, visits=visits, cache_bytes=1))
    assert line.startswith("3 steps of 2 pictures on each device; an epoch shows ")
    assert f"shows {told}" in line


def test_a_disk_is_charged_with_what_goes_on_it_alone(recipe: Path, tmp_path: Path) -> None:
    from libreflux.data.forecast import Forecast
    from libreflux.recipe import load_recipe
    from libreflux.training.phases import Estimate
    from libreflux.workflows.disk_use import disk_use

    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    parts: dict[str, Any] = dict.fromkeys(
        ("weights", "adapter", "moments", "gradient", "activations", "update", "averages"), 1
    )
    for checkpoint, cache, short in ((1, 10**18, other), (10**18, 1, tmp_path)):
        told = load_recipe(recipe, [f"out={tmp_path / 'o'}", f"cache={other / 'nothing-here' / 'cache'}"])
        used = disk_use(told, Estimate(on_cpu=True, checkpoint=checkpoint, **parts), Forecast(5, 5.0, cache))
        assert [line.partition(";")[0] for line in used.table().splitlines() if "too little" in line] == [
            f"too little is free in {short}"
        ]
        assert used.too_small == (short,)
        assert str(used.fault) == f"{short}: too little is free; hint: lower save.keep, or set out or cache elsewhere"


def test_train_writes_adapter_and_samples_and_then_has_nothing_to_do(
    run: Callable, recipe: Path, trained: Path
) -> None:
    run_folder = trained.parent
    sample = Image.open(run_folder / "samples" / "step-00000003.png")
    assert sample.width > 2 * 32  # two guidance scales beside each other
    before = trained.read_bytes()
    again = run("train", recipe)
    assert again.code == 0
    assert str(trained) in again.out
    assert trained.read_bytes() == before


def test_an_interrupted_run_exits_as_signalled_and_resumes_to_the_same_bytes(
    run: Callable, recipe: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from libreflux.training.callbacks import StepInfo
    from libreflux.workflows.run_record import RunRecorder

    told = RunRecorder.on_step

    def interrupt(self: RunRecorder, info: StepInfo) -> None:
        told(self, info)
        if info.step == 1:
            signal.raise_signal(signal.SIGINT)

    args = ["train", recipe, f"out={tmp_path / 'o'}", f"cache={trained.parent / 'cache'}"]
    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "on_step", interrupt)
        stopped = run(*args)
    assert stopped.code == 130
    assert "resumes" in stopped.err
    assert run(*args).code == 0
    assert (tmp_path / "o" / "adapter.safetensors").read_bytes() == trained.read_bytes()

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

import libreflux
from libreflux.model.quantise import quantise_folder
from libreflux.sample.metadata import read_record


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def test_version_and_help(run: Callable) -> None:
    assert run("--version").out.strip() == f"libreflux {libreflux.__version__}"
    for verb in ("generate", "prepare", "train", "merge", "average", "probe", "demo-data"):
        assert verb in run().out
        assert "Usage" in run(verb, "--help").out


def test_the_same_command_draws_the_same_bytes_and_the_png_says_how(
    run: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    args = ["generate", "a red apple on blue", "--model", tiny_model_dir, "--seed", 1, "--negative", "fox", "--out"]
    for name in ("a.png", "b.png"):
        assert run(*args, tmp_path / name).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert run(*args[:4], "--seed", 2, "--out", tmp_path / "c.png").code == 0
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "c.png")).any()
    record = read_record(tmp_path / "a.png")
    assert (record.prompt, record.negative, record.seed) == ("a red apple on blue", "fox", 1)
    assert (record.steps, record.guidance) == (4, 3.0)  # the model's facts
    assert (record.width, record.height) == Image.open(tmp_path / "a.png").size
    assert len(record.hashes["transformer"]) == 64


def test_a_negative_prompt_is_refused_where_the_models_own_guidance_is_none(
    run: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    facts = json.loads((model / "libreflux.json").read_text())
    (model / "libreflux.json").write_text(json.dumps(facts | {"guidance": 1.0}))
    common = ["generate", "x", "--model", model, "--negative", "fox", "--out", tmp_path / "x.png"]
    refused = run(*common)
    assert refused.code == 2
    assert "--negative: has no effect at guidance 1; hint: " in refused.err
    assert not (tmp_path / "x.png").exists()
    assert run(*common, "--guidance", 2).code == 0


def test_a_pause_of_guidance_that_never_ends_is_refused(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    common = ["generate", "x", "--model", tiny_model_dir, "--out", tmp_path / "x.png", "--negative", "fox"]
    for steps, given in ((["--steps", 2], 2), ([], 4), (["--steps", 1], 1)):  # 4 are the model's own
        refused = run(*common, *steps, "--no-cfg-until", given)
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert f"--no-cfg-until: leaves no step of {given} guided; hint: " in refused.err
    assert not (tmp_path / "x.png").exists()
    assert run(*common, "--steps", 2, "--no-cfg-until", 1).code == 0


def test_a_picture_depends_on_its_prompt_and_seed_alone(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    common = ["--model", tiny_model_dir, "--steps", 2, "--width", 48, "--height", 32]
    many = run("generate", "a fox", "a red apple", "--count", 2, "--seed", 5, *common, "--out", tmp_path / "many")
    assert many.code == 0
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [
        "001-a-fox-seed5.png",
        "001-a-fox-seed6.png",
        "002-a-red-apple-seed5.png",
        "002-a-red-apple-seed6.png",
    ]
    assert many.out.splitlines() == [str(path) for path in sorted((tmp_path / "many").iterdir())]
    assert run("generate", "a red apple", "--seed", 6, *common, "--out", tmp_path / "one.png").code == 0
    last = tmp_path / "many" / "002-a-red-apple-seed6.png"
    assert (tmp_path / "one.png").read_bytes() == last.read_bytes()
    assert Image.open(last).size == (48, 32)


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


@pytest.mark.parametrize("verb", ["merge", "generate"])
def test_an_adapter_that_its_run_prunes_after_it_was_read_is_used_as_it_was_read(
    run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    from libreflux.files import sha256_file
    from libreflux.model import opening
    from libreflux.model.source import ModelSource
    from libreflux.workflows import drawing

    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(trained.read_bytes())
    opened = opening.open_model

    def prune_first(*args: Any, **kwargs: Any) -> ModelSource:
        adapter.unlink(missing_ok=True)
        return opened(*args, **kwargs)

    monkeypatch.setattr(opening, "open_model", prune_first)
    monkeypatch.setattr(drawing, "open_model", prune_first)
    if verb == "merge":
        done = run("merge", tiny_model_dir, adapter, "--out", tmp_path / "model")
        rows = json.loads((tmp_path / "model" / "libreflux.json").read_text())["lineage"]["adapters"]
    else:
        done = run("generate", "x", "--model", tiny_model_dir, "--adapter", adapter, "--out", tmp_path / "x.png")
        rows = read_record(tmp_path / "x.png").adapters
    assert done.code == 0
    assert not adapter.exists()
    assert [row["sha256"] for row in rows] == [sha256_file(trained)]


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


def test_merging_equals_attaching(
    run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = run("merge", tiny_model_dir, f"{trained}:0.5", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    facts = json.loads((tmp_path / "merged" / "libreflux.json").read_text())
    (row,) = facts["lineage"]["adapters"]
    assert row["weight"] == 0.5
    assert row["step"] == "3"
    assert len(row["sha256"]) == 64
    draw = ["generate", "a fox", "--seed", 3, "--guidance", 2, "--steps", 3]
    attached = ["--model", tiny_model_dir, "--adapter", f"{trained}:0.5", "--out", tmp_path / "attached.png"]
    assert run(*draw, *attached).code == 0
    assert run(*draw, "--model", tmp_path / "merged", "--out", tmp_path / "merged.png").code == 0
    assert run(*draw, "--model", tiny_model_dir, "--out", tmp_path / "base.png").code == 0
    apart = np.abs(pixels(tmp_path / "attached.png") - pixels(tmp_path / "merged.png"))
    moved = np.abs(pixels(tmp_path / "attached.png") - pixels(tmp_path / "base.png"))
    assert apart.max() <= 1
    assert moved.max() > 1
    int8 = quantise_folder(tiny_model_dir, tmp_path / "int8")
    of_int8 = run("merge", int8, f"{trained}:0.5", "--out", tmp_path / "of-int8")
    assert of_int8.code == 0
    assert "stored in int8" in caplog.text
    one, other = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("merged", "of-int8")
    )
    assert one.keys() == other.keys()
    for name, weight in one.items():
        apart_by = (other[name].float() - weight.float()).abs().max()
        assert apart_by <= weight.float().abs().max() / 127, name
    again = run("merge", tiny_model_dir, trained, "--out", tmp_path / "merged")
    assert again.code == 2
    assert "already exists" in again.err


def test_an_adapter_brings_its_text_padding(run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    keep = tmp_path / "keep"
    shutil.copytree(tiny_model_dir, keep)
    facts = json.loads((keep / "libreflux.json").read_text()) | {"text_padding": "keep"}
    (keep / "libreflux.json").write_text(json.dumps(facts))
    assert run("generate", "a fox", "--model", keep, "--out", tmp_path / "y.png").code == 0
    assert run("generate", "a fox", "--model", keep, "--adapter", trained, "--out", tmp_path / "x.png").code == 0
    with safe_open(trained, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        other = tmp_path / "trim.safetensors"
        save_file(tensors, other, {**file.metadata(), "text_padding": "trim"})
    clash = run("merge", keep, trained, other, "--out", tmp_path / "m")
    assert clash.code == 2
    assert "text padding" in clash.err
    assert not (tmp_path / "m").exists()


def test_prepare_for_samples_is_no_cache_of_means(
    run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    args = ["prepare", pictures, "--out", tmp_path / "cache", "--model", tiny_model_dir, "--resolution", 32]
    assert run(*args, "--latents", "sample").code == 0
    assert (refused := run(*args)).code == 2
    assert "latents float32 mean and std, now float32; hint: " in refused.err
    unknown = run(*args, "--latents", "mode")
    assert unknown.code == 2
    assert "latents" in unknown.err
    assert unknown.err.count("\n") == 1


def test_prepare_again_finds_nothing_to_do(run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path) -> None:
    args = ["prepare", pictures, "--out", tmp_path / "cache", "--model", tiny_model_dir, "--resolution", 32]
    first = run(*args)
    assert first.code == 0
    assert "5 pictures prepared" in first.out
    shards = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert shards
    assert run(*args).code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")} == shards
    other = run(*args, "--text-padding", "trim")
    assert other.code == 2
    assert "text_padding" in other.err
    more = run(*args[:-1], 48)  # another resolution is more of the same cache
    assert more.code == 0


def test_demo_data_is_an_ordinary_folder_and_a_function_of_its_seed(run: Callable, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("demo-data", tmp_path / name, "--count", 3, "--seed", seed).code == 0
    contents = {name: sorted(path.read_bytes() for path in (tmp_path / name).iterdir()) for name in ("a", "b", "c")}
    assert contents["a"] == contents["b"] != contents["c"]
    assert len(list((tmp_path / "a").glob("*.png"))) == len(list((tmp_path / "a").glob("*.txt"))) == 3


def test_average_writes_an_adapter_that_generates(
    run: Callable, trained: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for option, value in (("--width", 0.1), ("--lerp", 0.5)):
        out = tmp_path / f"{option[2:]}.safetensors"
        made = run("average", trained.parent, option, value, "--out", out)
        assert made.code == 0, made.err
        assert str(out) in made.out
        assert "of its norm" in made.out
        drawn = ["--steps", 1, "--out", tmp_path / f"{option}.png"]
        assert run("generate", "a fox", "--model", tiny_model_dir, "--adapter", out, *drawn).code == 0
        assert "already exists" in run("average", trained.parent, option, value, "--out", out).err
    neither = run("average", trained.parent, "--out", tmp_path / "x.safetensors")
    assert neither.code == 2
    assert "--width" in neither.err

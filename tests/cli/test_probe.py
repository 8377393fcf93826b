"""`libreflux probe`, as a user runs it: a tiny model, a folder of pictures, a real process killed."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libreflux.probing.no_training import PictureMoments
from libreflux.probing.results import read_result
from opened import opened

SMALL = ["--quick", "--prompts", 3, "--guidance", "1,3", "--steps", "2,4"]


@pytest.fixture(scope="module")
def done(run: Callable[..., Any], tiny_model_dir: Path, plain: Path, judge: Path, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("probe") / "out"
    result = run("probe", tiny_model_dir, "--data", plain, "--judge", judge, "--out", out, *SMALL)
    assert result.code == 0, result.err
    assert "slope" in result.out
    assert "sigma 0.9, caption" in result.out
    assert str(out / "probe.json") in result.out
    return out


def test_all_seven_measures_are_there_with_intervals_and_pictures(done: Path) -> None:
    result = read_result(done)
    names = {one.name for one in result.measures}
    assert names >= {"loss", "slope", "prompt_gain", "guidance_response", "clipped", "latents_std", "accuracy"}
    assert names >= {"distance", "step_gap", "straightness", "diversity", "padding", "padding_batch", "negative"}
    assert {one.at["what"] for one in result.measures if one.name == "negative"} == {"velocity", "colour", "subject"}
    assert all(len(one.replicates) == 200 for one in result.measures)
    assert all(one.value == 0 for one in result.measures if one.name == "padding" and one.at["padding"] == "drop")
    assert {one.purpose for one in result.pictures} == {"guidance", "steps", "seeds", "negative"}
    assert all((done / one.file).is_file() for one in result.pictures)
    assert result.settings["rungs"] == [0.25, 0.5]
    assert result.settings["pictures"] == 5
    json.dumps(result.as_json(), allow_nan=False)


def test_the_same_command_measures_nothing_again_and_other_settings_do(
    run: Callable[..., Any], done: Path, tiny_model_dir: Path, plain: Path, judge: Path, tmp_path: Path
) -> None:
    files = {path: path.stat().st_mtime_ns for path in (done / "sections").iterdir()}
    command = ["probe", tiny_model_dir, "--data", plain, "--judge", judge, "--out", done, *SMALL]
    again = run(*command, "--json")
    assert json.loads(again.out) == json.loads((done / "probe.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in (done / "sections").iterdir()} == files
    seen = tmp_path / "seen.txt"
    seen.write_text("\n".join(find.split(" on ")[0].split(" ", 1)[1] for find in captions(plain)[:3]))
    assert run(*command, "--seen", seen).code == 0
    assert {one.subset for one in read_result(done).measures} >= {"all", "seen"}
    assert all(path.stat().st_mtime_ns != before for path, before in files.items())


def test_a_kept_picture_is_the_one_that_generate_draws(
    run: Callable[..., Any], done: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    kept = [one for one in read_result(done).pictures if one.purpose == "negative" and "negative" in one.at]
    chosen = [*kept[:1], *(one for one in read_result(done).pictures if one.at == {**one.at, "guidance": 1})][:2]
    for number, one in enumerate(chosen):
        at, out = one.at, tmp_path / f"{number}.png"
        words = ["--model", tiny_model_dir, "--seed", at["seed"], "--steps", at["steps"], "--out", out]
        words += ["--negative", at["negative"]] if "negative" in at else []
        assert run("generate", at["prompt"], "--guidance", at["guidance"], *words).code == 0
        ours, theirs = (np.asarray(Image.open(path), np.int64) for path in (done / one.file, out))
        assert ours.std() > 1
        assert abs(ours - theirs).max() <= 2
    assert len(chosen) == 2


def is_spread(row: dict[str, Any], guidance: float) -> bool:
    return row["name"] == "latents_std" and row["at"] == {"guidance": guidance} and row["subset"] == "all"


def captions(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("*.txt"))]


def test_a_killed_probe_goes_on_after_its_finished_sections_and_finds_the_same(
    done: Path, tiny_model_dir: Path, plain: Path, judge: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = ["probe", tiny_model_dir, "--data", plain, "--judge", judge, "--out", out, *SMALL]
    command = [sys.executable, "-m", "libreflux", *map(str, words)]
    first = out / "sections" / "guidance.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not first.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert first.is_file(), process.communicate()[1]
    process.wait()
    assert not (out / "probe.json").exists()
    before = first.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert first.stat().st_mtime_ns == before
    rows = [dataclasses.asdict(one) for one in read_result(out).measures]
    whole = tmp_path / "whole"
    subprocess.run(
        [*command[: -len(SMALL) - 1], str(whole), *map(str, SMALL)], check=True, capture_output=True, timeout=120
    )
    assert rows == [dataclasses.asdict(one) for one in read_result(whole).measures]


def test_an_adapter_is_probed_with_its_model(
    run: Callable[..., Any], done: Path, tiny_model_dir: Path, plain: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapted"
    words = ["--adapter", f"{trained}:0.5", "--data", plain, "--out", out, "--dtype", "fp32", "--guidance", "1"]
    result = run("probe", tiny_model_dir, *words, "--quick", "--prompts", 2, "--steps", "1,2", "--seed", 1)
    assert result.code == 0, result.err
    found, base = read_result(out), read_result(done)
    [row] = found.model["adapters"]
    assert (row["name"], row["weight"]) == ("adapter.safetensors", 0.5)
    assert found.model["sha256"] == base.model["sha256"]
    gap = found.find("step_gap", steps=1, against=2)
    assert gap is not None
    assert gap.unit == "latents, RMS"  # no judge here
    assert not any(one.name in ("accuracy", "distance", "best_guidance") for one in found.measures)
    assert {one.at["what"] for one in found.measures if one.name == "negative"} == {"velocity"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--guidance", "1,x"], "no list of numbers"),
        (["--guidance", "3,3"], "twice"),
        (["--steps", "4,2.5"], "cannot be 2.5"),
        (["--resolution", "40"], "multiple of 16"),
        (["--dtype", "fp8"], "no precision"),
        ([], "not of the emoji family"),
        (["--data", "nowhere"], "no such folder"),
        (["--judge", "nowhere"], "no such judge"),
    ],
)
def test_mistakes_are_one_line(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path, words: Any, told: str
) -> None:
    result = run("probe", tiny_model_dir, "--out", tmp_path / "out", *words)
    assert result.code == 2
    assert told in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_against_prints_the_freedom_of_models_that_were_measured_alike(
    run: Callable[..., Any],
    done: Path,
    tiny_model_dir: Path,
    plain: Path,
    judge: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PictureMoments, "best_w", lambda self: 1 / 3)
    from libreflux.model.facts import read_facts, write_facts

    changed = opened(tiny_model_dir)
    for index, parameter in enumerate(changed.transformer.parameters()):
        parameter.data.mul_(1.0 + 0.02 * (index % 3))
    student = changed.save(tmp_path / "student")
    out = tmp_path / "out"
    command = ["probe", tiny_model_dir, "--data", plain, "--judge", judge, *SMALL, "--out", out]

    theory = run(*command, "--against", student)
    assert theory.code == 0, theory.err
    assert "does not say what it was distilled from: compared with theory alone" in caplog.text
    assert "slope" in theory.out
    assert "freedom" in theory.out
    assert "index.html" in theory.out
    rows = json.loads((out / "freedom.json").read_text())["freedom"]
    assert {row["reference"] for row in rows if row["name"] == "slope"} == {1.0}
    assert "loss" not in {row["name"] for row in rows}
    assert f"--all prints all {len(rows)} rows" in theory.out
    assert len(theory.out.splitlines()) < len(rows)

    # Its lineage names the reference: the model itself, so everything that differs is closed.
    facts = read_facts(student)
    write_facts(student, dataclasses.replace(facts, lineage={"distilled_from": str(tiny_model_dir)}))
    told = run(*command, "--against", student, "--json", "--csv", tmp_path / "units.csv")
    assert told.code == 0, told.err
    with (tmp_path / "units.csv").open(encoding="utf-8", newline="") as file:
        units = list(csv.DictReader(file))
    own = [row for row in units if (row["measure"], row["at"]) == ("loss", "sigma 0.5, caption")]
    assert len(own) == 3 * 5
    assert {row["text"] for row in own} == set(captions(plain))
    untrained = json.loads(told.out)["no_training"]
    assert (untrained["chosen_on"], untrained["measured_on"]) == (2, 3)
    assert {row["kind"] for row in untrained["rows"]} == {"w", "k"}
    drawn = [row for row in untrained["rows"] if row["control"]["name"] == "clipped"]
    assert {row["kind"] for row in drawn} == {"w"}
    assert {row["control"]["at"]["guidance"] for row in drawn} == {1, 3}
    kept = {path.name for path in (out / "against" / "sections").glob("control-*")}
    assert kept == {f"control-{name}.json" for name in ("guidance", "diversity", "negative")}
    at_three = next(row["control"] for row in untrained["rows"] if is_spread(row["control"], 3))
    at_one = next(row for row in json.loads(told.out)["freedom"] if is_spread(row, 1))
    assert at_three["freed"] == pytest.approx(at_one["distilled"], rel=1e-3)  # 3 times a third
    losses = [row for row in json.loads(told.out)["freedom"] if row["name"] == "loss" and row["verdict"] == "gap"]
    assert losses
    assert all(row["share"] == 1.0 for row in losses)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<h1>") == 1
    assert "student" in page
    assert "http" not in page.replace("http-equiv", "")

    # Results that exist can be named instead of models; others' settings are refused.
    again = run(*command, "--against", out / "against", "--reference", done)
    assert again.code == 0, again.err
    whole = run(*command, "--against", out / "against", "--reference", done, "--all")
    assert whole.code == 0
    assert len(whole.out.splitlines()) > len(rows)
    assert "--all prints" not in whole.out
    refused = run(*command, "--all", "--json")
    assert refused.code == 2
    assert "--all: has no effect beside --json" in refused.err
    elsewhere = run(
        "probe",
        tiny_model_dir,
        "--data",
        plain,
        "--judge",
        judge,
        *SMALL,
        "--seed",
        1,
        "--out",
        tmp_path / "other",
        "--against",
        out / "against",
    )
    assert elsewhere.code == 2
    assert "another seed" in elsewhere.err
    alone = run("probe", tiny_model_dir, "--reference", student)
    assert alone.code == 2
    assert "--reference: needs --against" in alone.err


def test_a_local_vision_model_gives_distances_in_the_judges_place(
    run: Callable[..., Any], tiny_model_dir: Path, plain: Path, tmp_path: Path
) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    folder, out = tmp_path / "dino", tmp_path / "out"
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    command = ["probe", tiny_model_dir, "--data", plain, "--features", folder, "--out", out, *SMALL]
    early = run(*command)
    assert early.code == 2
    assert "no vision model" in early.err
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    done = run(*command)
    assert done.code == 0, done.err
    result = read_result(out)
    found = {(one.name, one.at.get("kind")) for one in result.measures}
    assert {("distance", "FD"), ("distance", "KD"), ("diversity", "features")} <= found
    assert "accuracy" not in {one.name for one in result.measures}
    assert all(np.isfinite(one.value) for one in result.measures if one.name == "distance")
    both = run(*command, "--judge", folder)
    assert both.code == 2
    assert "--features: takes the place of --judge" in both.err

"""What a newcomer meets first: help, lists of keys, mistyped words, summaries and the lines a training begins with."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from libreflux.cli.app import app
from libreflux.cli.tables import print_freedom, print_freedom_summary
from libreflux.cli.terminal import SafeConsole
from libreflux.cli.verb import PANELS, every_verb
from libreflux.errors import RecipeError
from libreflux.probing.freedom import FreedomRow
from libreflux.probing.report.summary import summary
from libreflux.recipe import Recipe, load_recipe
from libreflux.recipe.faults import ELSEWHERE, dotted_keys
from libreflux.recipe.key_list import recipe_keys


def app_commands() -> dict[str, Any]:
    """Every verb as typer runs it."""
    return every_verb(typer.main.get_command(app))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["generat", "a fox"], "Did you mean 'generate'?"),
        (["sample", "a fox"], "Did you mean 'generate'?"),
        (["dryrun", "r.yaml"], "Did you mean 'train RECIPE --dry-run'?"),
        (["finetune", "r.yaml"], "Did you mean 'train'?"),
        (["generate", "a fox", "--stepz", "4"], "--steps"),
        (["generate", "a fox", "--model", "emoji-lbre"], "did you mean emoji-libre?"),
        (["generate", "a fox", "--model", "FLUX.1-schnel"], "did you mean black-forest-labs/FLUX.1-schnell?"),
        (["generate", "a fox", "--model", "modles/mine"], "did you mean models/mine?"),
        (["generate", "a fox", "--model", "flux.safetensor.safetensors"], "did you mean flux.safetensors?"),
        (
            ["generate", "a fox", "--model", "emoji-libre", "--adapter", "adpter.safetensors"],
            "mean adapter.safetensors?",
        ),
        (["train", "mien.yaml"], "mien.yaml: no such recipe; hint: did you mean mine.yaml?"),
        (["train", "model/mine/x.yaml"], "did you mean models/mine?"),
        (["train", "nothing-like-it.yaml"], "no such recipe; hint: check the path"),
        (["train", "mine.yaml", "lr=1e-4"], "lr: unknown key; hint: did you mean 'optimizer.learning_rate'?"),
        (["train", "mine.yaml", "learning_rate=1e-4"], "did you mean 'optimizer.learning_rate'?"),
        (["train", "mine.yaml", "rank=4"], "did you mean 'adapter.rank'?"),
        (["train", "mine.yaml", "max_train_steps=4"], "did you mean 'steps'?"),
        (["train", "mine.yaml", "train_batch_size=4"], "did you mean 'batch'?"),
        (["train", "mine.yaml", "Batch-Size=4"], "did you mean 'batch'?"),
        (["train", "mine.yaml", "sead=4"], "did you mean 'seed'?"),
        (["train", "mine.yaml", "pretrained_model_name_or_path=x"], "did you mean 'model'?"),
        (["train", "mine.yaml", "output_dir=x"], "did you mean 'out'?"),
        (["train", "mine.yaml", "data.0.num_repeats=2"], "did you mean 'data.0.repeats'?"),
        (["train", "mine.yaml", "--lr", "1e-4"], "go without dashes: optimizer.learning_rate=VALUE"),
        (["train", "mine.yaml", "--steps", "4"], "go without dashes: steps=VALUE"),
        (["train", "mine.yaml", "out=o", "data.0.path=fotos", "--dry-run"], "did you mean photos?"),
        (["prepare", "fotos", "--out", "c"], "did you mean photos?"),
        (["generate", "--remake", "fos.png"], "fos.png: no such picture; hint: did you mean fox.png?"),
        (["generate", "a fox", "--comfyui", "modles"], "no such folder; hint: did you mean models?"),
        (
            ["average", "modles", "--width", "0.1", "--out", "x.safetensors"],
            "no such run folder; hint: did you mean models?",
        ),
        (["probe", "emoji-libre", "--features", "modles"], "no such folder; hint: did you mean models?"),
        (["probe", "emoji-libre", "--judge", "flux.safetensor"], "no such judge; hint: did you mean flux.safetensors?"),
        (["train", "mine.yaml", "zzz=1"], "`libreflux recipe` says what each is"),
        (["recipe", "optimiser"], "did you mean 'optimizer'?"),
        (["recipe", "lora_rank"], "did you mean 'adapter.rank'?"),
        (["recipe", "zzzz"], "`libreflux recipe` lists them all"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistyped_word_gets_the_nearest_one(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "model_index.json").touch()
    (tmp_path / "mine.yaml").write_text("data: [{path: photos}]\nresolution: 32\nsteps: 1\nout: o\n")
    for name in ("flux.safetensors", "adapter.safetensors", "fox.png"):
        (tmp_path / name).touch()
    done = run(*args)
    assert done.code == 2, done.err
    assert told in done.err, done.err
    assert len([line for line in done.err.splitlines() if "error" in line]) == 1


def test_other_trainers_names_lead_to_keys_that_there_are() -> None:
    known = set(dotted_keys(Recipe))
    for key, names in ELSEWHERE.items():
        assert key.replace(".0", "") in known
        assert not set(names.split()) & {one for one in known if "." not in one}


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("samples.guidance_scale", "samples.guidance"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
    ],
)
def test_another_trainers_name_leads_to_the_key_of_its_section(key: str, told: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{told}'"):
        load_recipe(None, ["data.0.path=photos", "resolution=512", "steps=10", "out=runs/a", f"{key}=3"])


@pytest.mark.parametrize("width", [80, 60, 30])
def test_recipe_lists_every_key_within_the_width(run: Callable, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    listed = run("recipe", "--all")
    assert listed.code == 0
    assert listed.err == ""
    names = [line.split()[0] for line in listed.out.splitlines() if line and not line.startswith(" ")]
    assert [name.replace(".0", "") for name in names] == list(dotted_keys(Recipe))
    lines = run("recipe").out.splitlines()
    assert max(len(line) for line in [*lines, *listed.out.splitlines()] if " " in line.strip()) <= width
    assert len(lines) < (80 if width == 80 else 200)


def test_a_listed_key_says_meaning_choices_and_default(run: Callable) -> None:
    rows = {key.name: key for key in recipe_keys(deep=True)}
    assert rows["steps"].text == "optimizer steps of the whole run [needed]"
    assert rows["data"].text == "folders of captioned pictures [needed]"
    assert rows["data"].section
    assert rows["optimizer.learning_rate"].default == "0.0001"
    assert rows["ema"].default == "[0.05, 0.1]"
    assert rows["optimizer.schedule"].choices == ("constant", "cosine", "linear")
    assert "one of constant, cosine, linear" in rows["optimizer.schedule"].text
    assert rows["threads"].text == "CPU threads; default: as many as torch chooses"
    assert [key.name for key in recipe_keys("data.0.repeats")] == ["data.0.repeats"]
    assert {key.name for key in recipe_keys("adapter.targets")} == {
        f"adapter.targets.0.{n}" for n in ("layers", "factor")
    }
    assert "optimizer.warmup" in run("recipe", "optimizer").out


def freedom_rows() -> list[FreedomRow]:
    """As many as `probe --against` finds of the emoji family, some of which a summary shows."""
    places: list[tuple[str, dict[str, str | float]]] = []
    for sigma in ("all", "on ladder", "off ladder", 0.1, 0.25, 0.5, 0.7, 0.9, 0.95, 0.98):
        for text in ("caption", "empty"):
            places += [(name, {"sigma": sigma, "text": text}) for name in ("loss", "slope")]
        places += [(name, {"sigma": sigma}) for name in ("prompt_gain", "guidance_response") if sigma != "all"]
    for scale in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0):
        places += [(name, {"guidance": scale}) for name in ("clipped", "latents_std")]
        places += [("accuracy", {"guidance": scale, "what": what}) for what in ("all", "subject", "colour")]
        places += [("distance", {"guidance": scale, "kind": kind}) for kind in ("FD", "KD")]
    places += [("accuracy", {"guidance": "own", "steps": n, "what": "all"}) for n in (4, 28, 50)]
    places += [("step_gap", {"against": n, "steps": 4}) for n in (50, 28)]
    places += [("negative", {"what": what}) for what in ("velocity", "colour", "subject")]
    return [
        FreedomRow(
            name=name,
            at=at,
            subset=subset,
            unit="",
            distilled=213.506,
            freed=-213.707,
            reference=217.676,
            share=0.72,
            low=-1.14,
            high=1.0,
            verdict="gap",
            beyond=True,
        )
        for subset in ("seen", "unseen", "all")
        for name, at in places
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_freedom_is_summed_up_within_the_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows, told, whole = freedom_rows(), io.StringIO(), io.StringIO()
    print_freedom_summary(rows, "emoji", SafeConsole(file=told))
    print_freedom(rows, "emoji", SafeConsole(file=whole))
    lines = told.getvalue().splitlines()
    assert len(rows) > 200
    assert len(whole.getvalue().splitlines()) > len(rows)
    assert len(lines) <= 35
    assert max(map(len, lines)) <= width
    text = " ".join(told.getvalue().split())
    for shown in ("loss, sigma all, caption", "prompt_gain, sigma 0.9", "FD-emoji, guidance 4", "against 28"):
        assert shown in text
    assert "72 % [-114, 100], beyond" in text
    assert "unseen" not in text
    assert "guidance 8" not in text


@pytest.mark.parametrize(
    ("name", "places", "nearest"),
    [
        ("clipped", [{"guidance": 1.0}, {"guidance": 3.5}, {"guidance": 8.0}], 1),
        ("slope", [{"sigma": 0.5, "text": "caption"}, {"sigma": 0.98, "text": "caption"}], 1),
        ("slope", [{"sigma": 0.9, "text": "empty"}, {"sigma": 0.1, "text": "caption"}], 1),
        ("accuracy", [{"guidance": 1.0, "what": "colour"}, {"guidance": 1.0, "what": "all"}], 1),
        ("straightness", [{}], 0),
    ],
)
def test_a_summary_takes_what_is_nearest(name: str, places: list[dict[str, str | float]], nearest: int) -> None:
    row = freedom_rows()[0]
    rows = [dataclasses.replace(row, name=name, at=at, subset="all") for at in places]
    assert summary(rows) == [rows[nearest]]
    assert summary([dataclasses.replace(one, subset="seen") for one in rows]) == []


@pytest.mark.parametrize("verb", sorted(app_commands()))
def test_help_says_all_of_what_is_written(verb: str) -> None:
    """Text in square brackets would be taken for a style, and not be shown."""
    command = app_commands()[verb]
    for text in (command.help, *(getattr(one, "help", None) for one in command.params)):
        assert Text.from_markup(text or "").plain == (text or "")


@pytest.mark.parametrize("verb", sorted(app_commands()))
def test_help_of_many_options_is_in_groups(run: Callable, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = {str(p.name) for p in app_commands()[verb].params if p.param_type_name == "option"}
    words = verb.split()
    panels = PANELS.get(words[-1], {})
    named = [name for names in panels.values() for name in names.split()]
    assert (len(options) > 10) == bool(panels)
    told = run(*words, "--help").out
    titles = [line.strip("╭─╮ ") for line in told.splitlines() if line.startswith("╭")]
    assert max(map(len, told.splitlines())) <= 80
    if panels:
        assert sorted(named) == sorted(options)
        assert titles == ["Arguments", *panels]


def test_a_training_begins_in_few_lines_within_the_width(
    run: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for layers in ([], ["--layers"]):
        done = run("train", recipe, "steps=1", "samples={every: 0}", f"out=o{len(layers)}", *layers)
        assert done.code == 0, done.err
        before = done.err.partition("training: ")[0].splitlines()
        assert max(len(line) for line in before if str(tmp_path.parent) not in line) <= 80
        table = [line for line in before if line.startswith("layer ")]
        assert len(table) == len(layers)
        assert 3 < len(before) < 20 or layers

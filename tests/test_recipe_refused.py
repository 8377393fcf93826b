"""What a recipe and its overrides refuse: the key, what is wrong with it and the hint on one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from least import LEAST
from libreflux.errors import RecipeError
from libreflux.recipe import load_recipe, yaml_text


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides if path else [*LEAST, *overrides])
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimiser.learning_rate=1", "optimiser: unknown key; hint: did you mean 'optimizer'?"),
        ("optimizer.learning_rte=1", "optimizer.learning_rte: unknown key; hint: did you mean 'learning_rate'?"),
        ("learning_rte=1", "learning_rte: unknown key; hint: did you mean 'optimizer.learning_rate'?"),
        ("data.0.caption_dropot=1", "data.0.caption_dropot: unknown key; hint: did you mean 'caption_dropout'?"),
        ("adapter.targets=[{layer: x}]", "adapter.targets.0.layer: unknown key"),
        ("optimizer.learning-rate=1", "optimizer.learning-rate: unknown key; hint: did you mean 'learning_rate'?"),
        ("zzz=1", "zzz: unknown key; hint: the keys here are schema, model,"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest(override: str, told: str) -> None:
    assert refusal(override).startswith(f"recipe: {told}")


@pytest.mark.parametrize(
    "override",
    [
        "text_padding=keep",
        "text_padding=bias",
        "crop=random",
    ],
)
def test_what_comes_later_is_refused_as_such(override: str) -> None:
    line = refusal(override)
    assert "not supported yet" in line
    assert override.partition("=")[0] in line


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("schema=2", "schema"),
        ("steps=0", "steps"),
        ("steps=1.5", "steps"),
        ("steps=many", "'many'"),
        ("batch=true", "whole number"),
        ("resolution=500", "multiple of 16"),
        ("resolution=[]", "resolution"),
        ("resolution=[512, 500]", "multiple of 16"),
        ("resolution=[512, 512]", "given twice"),
        ("crop=middle", "crop"),
        ("max_quarantined=2", "max_quarantined"),
        ("data.0.weight=0", "data.0.weight"),
        ("data=[]", "data"),
        ("data.0.repeats=0", "data.0.repeats"),
        ("data.0.caption_dropout=1.5", "data.0.caption_dropout"),
        ("data.0.captions={short: -1}", "zero or more"),
        ("data.0.captions=[0, 0]", "above zero"),
        ("data.0.background=octarine", "'octarine' is no colour"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("optimizer.betas=[0.9, 1.0]", "[0, 1)"),
        ("optimizer=3", "optimizer"),
        ("ema=[0.3]", "ema"),
        ("adapter={kind: lora, init: perturbed}", "init perturbed is for LoKr"),
        ("adapter={kind: lora, targets: [{layers: '**', factor: 4}]}", "a LoRA has a rank"),
        ("adapter.rank=8", "rank and alpha belong to a LoRA"),
        ("adapter={init: ones, scale: 2e-3}", "scale belongs to the perturbed start"),
        ("adapter={preset: libreflux-600m, targets: [{layers: '**'}]}", "targets and preset each choose the layers"),
        ("adapter={init_from: a.safetensors, init: ones}", "init_from is the start; remove init"),
        ("adapter.training_adapter=a.safetensors:strong", "'strong' is no weight"),
        ("adapter={role: training_adapter, training_adapter: a.safetensors}", "makes one, and training_adapter uses"),
        ("samples={prompts: [a], with_training_adapter: true}", "would do nothing without adapter.training_adapter"),
        ("ema=[0.1, 0.1]", "different widths"),
        ("held_out.share=1", "held_out.share"),
        ("held_out.every=5", "share or path must say which pictures"),
        ("held_out={share: 0.1, path: more}", "share and path each choose the pictures"),
        ("held_out={share: 0.1, sigmas: [0.5, 0.5]}", "the same value twice"),
        ("held_out={share: 0.1, sigmas: [1]}", "held_out.sigmas.0"),
        ("sigmas.alpha=0", "sigmas.alpha"),
        ("sigmas.shift=0", "sigmas.shift"),
        ("sigmas.std=2", "std belongs to the logit-normal law and does nothing under beta"),
        ("sigmas={law: uniform, beta: 1.6}", "beta belongs to the beta law and does nothing under uniform"),
        ("sigmas.uniform_floor=1", "all of it is law: uniform"),
        ("sigmas={law: uniform, uniform_floor: 0.1}", "uniform_floor does nothing under the uniform law"),
        ("samples.every=100", "samples: every would do nothing without prompts"),
        ("samples={guidance: [1, 3], seed: 1}", "guidance and seed would do nothing without prompts"),
        ("samples={every: 0, seed: 1}", "seed would do nothing without prompts"),
        ("samples.at_start=true", "at_start would do nothing without prompts"),
        ("save={every: 500, keep_every: 700}", "keep_every 700 must be a multiple of every 500"),
        ("data.0={path: a, caption_dropout: 1, prefix: x, captions: [1]}", "so captions and prefix would do nothing"),
        ("seed=-1", "seed"),
        ("seed.x=1", "seed"),
        ("out=", "out"),
    ],
)
def test_a_bad_value_is_named(override: str, told: str) -> None:
    assert told in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optimizer.warmup=10"], "optimizer.warmup 10 would fill all of steps 10"),
        (["ema=[]", "save.averages_every=5"], "save.averages_every would keep nothing while ema is []"),
        (["crop=centre", "data.0.crops_per_picture=2"], "data.crops_per_picture would do nothing under crop: centre"),
    ],
)
def test_a_key_that_another_makes_idle_is_refused_and_either_alone_is_not(overrides: list[str], told: str) -> None:
    assert told in refusal(*overrides)
    load_recipe(None, [*LEAST, "optimizer.warmup=9"])
    for override in overrides if len(overrides) > 1 else ():
        load_recipe(None, [*LEAST, override])


def test_a_switch_that_is_off_refuses_nothing() -> None:
    """`samples.every=0` turns the pictures of any recipe off; a cadence may be longer than the run, which can grow."""
    for prompts in ("[]", "[a fox]"):
        load_recipe(None, [*LEAST, "samples.every=0", f"samples.prompts={prompts}"])
    load_recipe(None, [*LEAST, "samples={every: 99, prompts: [a fox]}", "save={keep_every: 5000, averages_every: 700}"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps", "not an override; hint: write key=value"),
        ("=3", "not an override"),
        ("data.5.path=x", "'5' is no item of a list of 1"),
        ("data.path=x", "'path' is no item of a list of 1"),
        ("steps.more.deep=1", "steps is a value, it has no keys"),
        ("steps=[1", "not valid YAML"),
    ],
)
def test_a_bad_override_is_named(override: str, told: str) -> None:
    assert told in refusal(override)


def test_what_is_missing_is_named_with_its_meaning() -> None:
    with pytest.raises(RecipeError, match=r"data: this key is needed .*folders of captioned pictures"):
        load_recipe(None, ["steps=1"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("seed: 1\nseed: 2\n", "'seed' twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "a recipe is a mapping"),
        ("1: 2\n", "not text"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line_with_the_file(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    line = refusal(path=path)
    assert line.startswith(str(path))
    assert told in line


def test_unreadable_recipes_are_one_line(tmp_path: Path) -> None:
    assert "no such recipe" in refusal(path=tmp_path / "none.yaml")
    assert "cannot be read" in refusal(path=tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert "cannot be read" in refusal(path=tmp_path / "latin.yaml")


def test_a_comment_in_an_override_is_refused_not_dropped() -> None:
    assert "begins a comment" in refusal("out=my demo #2")
    assert load_recipe(None, [*LEAST, 'out="my demo #2"']).out == "my demo #2"
    for text in ("plain/path", "my demo #2", "yes", "1e-4", "a: b", "- x", "", "ü'\""):
        assert yaml_text.parse(yaml_text.scalar(text)) == text
    assert yaml_text.scalar("plain/path") == "plain/path"

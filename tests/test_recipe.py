from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from libreflux.errors import RecipeError
from libreflux.recipe import Recipe, differences, load_recipe, yaml_text

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
LEAST = ["data.0.path=photos", "resolution=512", "steps=10", "out=runs/a"]
DESIGN = """
schema: 1
model: black-forest-labs/FLUX.1-schnell
base: bf16
objective: flow
text_padding: drop
data:
  - {path: photos, repeats: 1, captions: {short: 0.3, long: 0.7}, caption_dropout: 0.1, crops_per_picture: 2}
resolution: [512, 1024]
crop: [square, aspect]
adapter:
  kind: lokr
  init: perturbed
  targets:
    - {layers: "transformer_blocks.{0-7}.attn.**", factor: 4}
    - {layers: "single_transformer_blocks.**", factor: 8}
sigmas: {law: beta, alpha: 2.0, beta: 2.0, stratified: true, uniform_floor: 0.0}
batch: 1
accumulate: 8
steps: 2e4
optimizer: {kind: adamw_bf16, learning_rate: 1e-4, weight_decay: 0.01, warmup: 200, schedule: constant}
samples: {every: 500, at_start: true, prompts: ["a red apple on blue"], guidance: [1, 3.5], seed: 42}
save: {every: 500, keep: 4, keep_every: 5000}
seed: 0
out: runs/first
"""


@pytest.fixture
def design(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(DESIGN)
    return path


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides if path else [*LEAST, *overrides])
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_designs_recipe_is_read(design: Path) -> None:
    recipe = load_recipe(design)
    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.steps == 20000
    assert recipe.resolution == (512, 1024)
    assert recipe.crop == ("square", "aspect")
    assert load_recipe(None, LEAST).resolution == (512,)
    assert recipe.data[0].captions == {"short": 0.3, "long": 0.7}
    assert [target.factor for target in recipe.adapter.targets or ()] == [4, 8]
    assert recipe.cache_dir == Path("runs/first/cache")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "+1e-4", "0.0001", '"1e-4"'])
def test_numbers_mean_what_they_look_like(text: str) -> None:
    assert load_recipe(None, [*LEAST, f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 1e-4


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"))
        | st.integers()
        | st.floats(allow_nan=False)
        | st.booleans()
        | st.none(),
        st.lists,
    )
)
def test_yaml_reads_back_what_it_wrote(value: Any) -> None:
    assert yaml_text.parse(yaml_text.dump({"key": value})) == {"key": value}


def test_a_resolved_recipe_reads_back_equal(design: Path, tmp_path: Path) -> None:
    recipe = load_recipe(design, ["samples.prompts=['1e5', 'yes', 'a: b']"])
    assert recipe.samples.prompts == ("1e5", "yes", "a: b")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.resolved()["schema"] == 1
    assert again.fingerprint() == recipe.fingerprint()
    assert Recipe.model_validate(recipe.resolved()) == recipe


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


def test_overrides_reach_into_lists_and_append(design: Path) -> None:
    recipe = load_recipe(
        design, ["data.1.path=more", "data.0.repeats=3", "adapter.targets.1.factor=16", "samples.prompts.0=a fox"]
    )
    assert [(source.path, source.repeats) for source in recipe.data] == [("photos", 3), ("more", 1)]
    assert [target.factor for target in recipe.adapter.targets or ()] == [4, 16]
    assert recipe.samples.prompts == ("a fox",)


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


def test_the_fingerprint_follows_what_decides_the_numbers() -> None:
    base = load_recipe(None, LEAST)
    for harmless in (
        "out=runs/b",
        "cache=c",
        "samples={every: 7, prompts: [a fox]}",
        "save.keep=9",
        "steps=99",
        "gradient_norms=true",
        "tensorboard=true",
        "max_skipped=1",
        "ema=[]",
        "held_out={path: more, every: 7, pictures: 8, sigmas: [0.5]}",
        "latents=mean",
        "data.0.path=elsewhere",
        "threads=3",
        "gradient_checkpointing=true",
        "text_cache=none",
    ):
        assert load_recipe(None, [*LEAST, harmless]).fingerprint() == base.fingerprint(), harmless
    for decisive in (
        "seed=1",
        "batch=2",
        "model=x",
        "data.0.repeats=2",
        "optimizer.clip=null",
        "adapter.scale=2e-3",
        "held_out.share=0.1",
        "latents=sample",
        "text_cache=int8",
    ):
        assert load_recipe(None, [*LEAST, decisive]).fingerprint() != base.fingerprint(), decisive
    assert "latents" not in base.decisive()  # so that runs from before this key go on
    falling = [*LEAST, "optimizer.schedule=cosine"]
    assert load_recipe(None, falling).fingerprint() != load_recipe(None, [*falling, "steps=99"]).fingerprint()


@pytest.mark.parametrize(
    ("override", "resolved"),
    [
        ("adapter={}", {"init": "perturbed", "targets": [{"layers": "**", "factor": 8}], "rank": None}),
        ("adapter.kind=lora", {"init": "kaiming", "targets": [{"layers": "**", "factor": None}], "rank": 16}),
        ("adapter.preset=libreflux-600m", {"init": "perturbed", "targets": None}),
        ("adapter.init_from=a.safetensors", {"init": None, "targets": None}),
    ],
)
def test_adapter_defaults_are_spelt_out_and_read_back(override: str, resolved: dict[str, Any]) -> None:
    recipe = load_recipe(None, [*LEAST, override])
    assert recipe.resolved()["adapter"].items() >= resolved.items()
    assert Recipe.model_validate(recipe.resolved()) == recipe
    assert Recipe.model_validate({**recipe.resolved(), "adapter": recipe.adapter}) == recipe


def test_differences_name_dotted_keys() -> None:
    old = load_recipe(None, LEAST).resolved()
    new = load_recipe(None, [*LEAST, "optimizer.warmup=5", "data.0.captions=[1]", "data.1.path=x"]).resolved()
    keys = differences(old, new)
    assert "optimizer.warmup" in keys
    assert "data.0.captions" in keys
    assert "data.1.path" in keys
    assert differences(old, old) == []
    assert not [key for key in keys if not key.startswith(("optimizer.warmup", "data.0.captions", "data.1"))]


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        kinds: list[Any] = [field.annotation]
        for kind in kinds:
            kinds += typing.get_args(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


def test_every_key_says_what_it_is() -> None:
    seen = list(sections(Recipe))
    assert len(seen) == 10
    for section in seen:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_recipes_are_read_without_torch() -> None:
    code = f"import sys, libreflux.recipe as r; r.load_recipe(None, {LEAST}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_dumper_is_safe() -> None:
    with pytest.raises(yaml.YAMLError):
        yaml_text.dump(object())


def test_a_comment_in_an_override_is_refused_not_dropped() -> None:
    assert "begins a comment" in refusal("out=my demo #2")
    assert load_recipe(None, [*LEAST, 'out="my demo #2"']).out == "my demo #2"
    for text in ("plain/path", "my demo #2", "yes", "1e-4", "a: b", "- x", "", "ü'\""):
        assert yaml_text.parse(yaml_text.scalar(text)) == text
    assert yaml_text.scalar("plain/path") == "plain/path"

"""Recipes: what is read, what is written back, which keys decide a run's numbers, and that each says what it is."""

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

from least import LEAST
from libreflux.recipe import Recipe, differences, load_recipe, read_recipe, yaml_text

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
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


def test_overrides_reach_into_lists_and_append(design: Path) -> None:
    recipe = load_recipe(
        design, ["data.1.path=more", "data.0.repeats=3", "adapter.targets.1.factor=16", "samples.prompts.0=a fox"]
    )
    assert [(source.path, source.repeats) for source in recipe.data] == [("photos", 3), ("more", 1)]
    assert [target.factor for target in recipe.adapter.targets or ()] == [4, 16]
    assert recipe.samples.prompts == ("a fox",)


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
        "adapter.role=training_adapter",
        "adapter.training_adapter=a.safetensors",
    ):
        assert load_recipe(None, [*LEAST, decisive]).fingerprint() != base.fingerprint(), decisive
    assert "latents" not in base.decisive()  # so that runs from before this key go on
    assert not {"role", "training_adapter"} & base.decisive()["adapter"].keys()  # nor these
    one, other, weaker = ("a.safetensors", "b.safetensors:1", "a.safetensors:0.5")  # where the file lies is no matter
    told = [load_recipe(None, [*LEAST, f"adapter.training_adapter={each}"]).fingerprint() for each in (one, other)]
    assert told[0] == told[1]
    assert load_recipe(None, [*LEAST, f"adapter.training_adapter={weaker}"]).fingerprint() != told[0]
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
    assert len(seen) == 13
    for section in seen:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_recipes_are_read_without_torch() -> None:
    code = f"import sys, libreflux.recipe as r; r.load_recipe(None, {LEAST}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_dumper_is_safe() -> None:
    with pytest.raises(yaml.YAMLError):
        yaml_text.dump(object())


def test_samples_with_a_training_adapter_are_drawn_as_the_distilled_model_draws() -> None:
    given = [*LEAST, "adapter.training_adapter=a.safetensors", "samples={prompts: [a fox]}"]
    recipe = load_recipe(None, given)
    assert recipe.samples.guidance == (1.0,)
    assert read_recipe(recipe.to_yaml(), "r.yaml") == recipe
    assert load_recipe(None, [*given, "samples.guidance=[2]"]).samples.guidance == (2.0,)
    assert load_recipe(None, [*given, "samples.with_training_adapter=true"]).samples.guidance == (3.0,)
    for scale, wanted in ((3, (1.0,)), (1, (3.0,))):  # a guided target has the guidance in it
        guided = [*LEAST, "samples={prompts: [a fox]}", f"guided_target.scale={scale}"]
        assert load_recipe(None, guided).samples.guidance == wanted
    assert load_recipe(None, given[:-2] + given[-1:]).samples.guidance == (3.0,)

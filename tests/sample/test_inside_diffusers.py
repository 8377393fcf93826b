"""The pipeline as diffusers makes it: the model's facts come along, and adapters are loaded by diffusers' names."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from libreflux.adapter.adapter import attach
from libreflux.adapter.export import export_adapter
from libreflux.adapter.io import load_adapter, save_adapter
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.merge import merge
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError, ModelError, RecipeError
from libreflux.model.facts import KNOWN, Facts, facts_of, write_facts
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import opened, tensor_of
from tiny import tiny_transformer, tiny_vae

KEEP = Facts(text_padding="keep", max_tokens=24, steps=3, guidance=2.0, shift=2.0)
PROMPT = "a fox"


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model, trained with its padding."""
    made = shutil.copytree(tiny_model_dir, tmp_path / "keep")
    write_facts(made, KEEP)
    return made


def latents(pipe: LibreFluxPipeline, **given: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return tensor_of(pipe(PROMPT, seeds=1, output_type="latent", **given))


def custom(folder: Path) -> LibreFluxPipeline:
    code = folder.parent / "drawing.py"
    code.write_text("from libreflux import LibreFluxPipeline\n")
    made: LibreFluxPipeline = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(code), trust_remote_code=True
    )
    return made


def bare(folder: Path) -> LibreFluxPipeline:
    flux = FluxPipeline.from_pretrained(folder)
    transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    return LibreFluxPipeline(**flux.components | {"transformer": transformer})


WAYS: dict[str, Callable[[Path], LibreFluxPipeline]] = {
    "components": lambda folder: LibreFluxPipeline(**FluxPipeline.from_pretrained(folder).components),
    "from_pipe": lambda folder: LibreFluxPipeline.from_pipe(FluxPipeline.from_pretrained(folder)),
    "custom_pipeline": custom,
    "a transformer alone": bare,
    "there and back": lambda folder: LibreFluxPipeline.from_pipe(
        FluxPipeline.from_pipe(LibreFluxPipeline.from_pretrained(folder))
    ),
    "own components": lambda folder: LibreFluxPipeline(**LibreFluxPipeline.from_pretrained(folder).components),
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_the_models_facts_come_along(folder: Path, way: str) -> None:
    made = WAYS[way](folder)
    assert made.facts == KEEP
    assert torch.equal(latents(made), latents(LibreFluxPipeline.from_pretrained(folder)))
    made.facts = Facts()
    assert not torch.equal(latents(made, num_inference_steps=3), latents(WAYS["own components"](folder)))


def test_facts_that_were_set_go_to_the_next_pipeline(folder: Path) -> None:
    first = LibreFluxPipeline.from_pretrained(folder)
    first.facts = Facts(steps=2)
    flux = FluxPipeline(**first.components)
    assert LibreFluxPipeline.from_pipe(flux).facts == LibreFluxPipeline(**flux.components).facts == Facts(steps=2)
    assert LibreFluxPipeline.from_pipe(flux, facts=KEEP).facts == KEEP


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_without_a_folder_the_nearest_is_taken_with_a_notice(
    guidance_embeds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A transformer built in memory, or loaded from a single file by diffusers."""
    like = "FLUX.1-dev" if guidance_embeds else "FLUX.1-schnell"
    with caplog.at_level(logging.WARNING):
        made = LibreFluxPipeline(tiny_transformer(guidance_embeds=guidance_embeds), tiny_vae())
        LibreFluxPipeline(made.transformer, tiny_vae())
    assert made.facts == KNOWN[f"black-forest-labs/{like}"]
    notice = f"a transformer of no known origin has no libreflux.json: taken for a model like {like}"
    assert caplog.text.count(notice) == 1  # of one transformer once


@pytest.mark.parametrize(
    "came_from",
    ["jimmycarter/LibreFLUX", "/cache/hub/models--jimmycarter--LibreFLUX/snapshots/0123abcd/transformer"],
)
def test_a_known_model_of_the_hub_is_known_by_its_place(came_from: str) -> None:
    flux = tiny_transformer()
    flux.register_to_config(_name_or_path=came_from)
    assert facts_of(flux) == KNOWN["jimmycarter/LibreFLUX"]


def test_facts_that_are_not_the_transformers_are_refused(folder: Path) -> None:
    guided = tiny_transformer(guidance_embeds=True)
    guided.register_to_config(_name_or_path=str(folder / "transformer"))
    with pytest.raises(ModelError, match=r"keep: guidance_embeds in libreflux\.json is not the transformer's"):
        LibreFluxPipeline(guided, tiny_vae())


def test_parts_that_are_none_are_refused(folder: Path) -> None:
    flux = FluxPipeline.from_pretrained(folder)
    with pytest.raises(ModelError, match="image_encoder: image prompts are not drawn with"):
        LibreFluxPipeline(**flux.components | {"image_encoder": tiny_vae()})
    code = folder.parent / "drawing.py"
    code.write_text("from libreflux import LibreFluxPipeline\n")
    with pytest.raises(ModelError, match=r"use LibreFluxPipeline\.from_pipe"):
        DiffusionPipeline.from_pipe(flux, custom_pipeline=str(code), trust_remote_code=True)
    with pytest.raises(ModelError, match="has no FLUX transformer"):
        LibreFluxPipeline.from_pipe(flux, transformer=None)


def test_from_pipe_casts_only_when_asked(folder: Path) -> None:
    """diffusers casts what is shared to fp32: of a bf16 model of FLUX's size 24 GB more."""
    flux = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert LibreFluxPipeline.from_pipe(flux).transformer.dtype == torch.bfloat16
    assert LibreFluxPipeline.from_pipe(flux, torch_dtype="fp32").transformer.dtype == torch.float32


def test_diffusers_opens_what_was_saved(folder: Path, tmp_path: Path) -> None:
    made = WAYS["components"](folder)
    made.save_pretrained(tmp_path / "saved")
    assert FluxPipeline.from_pretrained(tmp_path / "saved").transformer is not None
    assert torch.equal(latents(LibreFluxPipeline.from_pretrained(tmp_path / "saved")), latents(made))


SAID = {"text_padding": "drop", "max_tokens": "32", "sampling_steps": "5", "guidance": "4.0"}
UNDER = Facts(text_padding="drop", max_tokens=32, steps=5, guidance=4.0, shift=2.0)


def adapter(path: Path, kind: str = "lora", seed: int = 1, metadata: dict[str, str] | None = None) -> Path:
    flux = tiny_transformer()
    target = Target(layers="**", rank=3, alpha=1.5) if kind == "lora" else Target(layers="**.attn.**", factor=2)
    made = attach(flux, resolve(linear_shapes(flux), [target]))
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    save_adapter(made, path, SAID if metadata is None else metadata)
    return path


@pytest.mark.parametrize("kind", ["lora", "lokr", "diffusers", "kohya"])
def test_a_loaded_adapter_draws_as_a_merged_one(folder: Path, tmp_path: Path, kind: str) -> None:
    own = adapter(tmp_path / "own.safetensors", "lokr" if kind == "lokr" else "lora")
    if kind in ("diffusers", "kohya"):
        export_adapter(load_adapter(own), kind, tmp_path / f"{kind}.safetensors")
    pipe, merged = LibreFluxPipeline.from_pretrained(folder), opened(folder)
    plain = latents(pipe)
    name = "own" if kind in ("lora", "lokr") else kind
    pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", weight=0.7)
    merge(merged.transformer, load_adapter(own), 0.7)
    merged.facts = UNDER
    torch.testing.assert_close(latents(pipe), latents(merged.pipeline()), rtol=0, atol=1e-4)
    assert pipe.facts == UNDER
    assert pipe.get_active_adapters() == ["default_0"]
    pipe.unload_lora_weights()
    assert pipe.facts == KEEP
    assert torch.equal(latents(pipe), plain)


def test_several_adapters_are_weighed_and_shared(folder: Path, tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / f"{seed}.safetensors", seed=seed, metadata={}) for seed in (1, 2))
    pipe = LibreFluxPipeline.from_pretrained(folder)
    pipe.load_lora_weights(one, "one")
    alone = latents(pipe)
    pipe.load_lora_weights(str(two), adapter_name="two")
    both = latents(pipe)
    pipe.set_adapters("one")
    assert torch.equal(latents(pipe), alone)
    assert pipe.get_active_adapters() == ["one"]
    pipe.set_adapters(["one", "two"], [1.0, 1])
    assert torch.equal(latents(pipe), both)
    assert not torch.equal(both, alone)
    other = LibreFluxPipeline(**pipe.components)
    assert torch.equal(latents(other), both)
    other.unload_lora_weights()
    assert pipe.get_active_adapters() == []
    assert pipe.facts == other.facts == KEEP
    assert torch.equal(latents(pipe), latents(LibreFluxPipeline.from_pretrained(folder)))


def test_facts_are_those_of_the_adapters_in_use(folder: Path, tmp_path: Path) -> None:
    pipe = LibreFluxPipeline.from_pretrained(folder)
    for name, steps in (("one", "11"), ("two", "22")):
        said = {"text_padding": "drop", "sampling_steps": steps}
        pipe.load_lora_weights(adapter(tmp_path / f"{name}.safetensors", metadata=said), name)
    assert pipe.facts.steps == 22
    pipe.set_adapters("one", 0.5)
    assert (pipe.facts.steps, pipe.facts.text_padding) == (11, "drop")
    pipe.set_adapters(["one", "two"])
    assert pipe.facts.steps == 22
    pipe.set_adapters([])
    assert pipe.facts == KEEP


def test_facts_follow_in_every_pipeline_over_the_transformer(folder: Path, tmp_path: Path) -> None:
    pipe = LibreFluxPipeline.from_pretrained(folder)
    pipe.load_lora_weights(adapter(tmp_path / "a.safetensors"))
    assert LibreFluxPipeline.from_pipe(FluxPipeline(**pipe.components)).facts == pipe.facts == UNDER
    pipe.facts = Facts(steps=7)
    assert pipe.facts == Facts(steps=7)  # the caller knows better, as long as the adapters stay
    pipe.unload_lora_weights()
    assert pipe.facts == KEEP == LibreFluxPipeline(**pipe.components).facts


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    pipe = LibreFluxPipeline.from_pretrained(folder)
    before = latents(pipe)
    good = adapter(tmp_path / "good.safetensors", metadata={"text_padding": "drop"})
    other = adapter(tmp_path / "trim.safetensors", metadata={"text_padding": "trim"})
    with pytest.raises(AdapterError, match="no such adapter file"):
        pipe.load_lora_weights("someone/a-lora")
    with pytest.raises(RecipeError, match="weight: 'much' is no weight"):
        pipe.load_lora_weights(good, weight="much")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"weight: 10+ is no weight"):
        pipe.load_lora_weights(good, weight=10**400)
    with pytest.raises(RecipeError, match="path: is no path but a dict"):
        pipe.load_lora_weights({"a": torch.zeros(1)})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no adapter is called 'x'; hint: loaded: none"):
        pipe.set_adapters("x")
    assert torch.equal(latents(pipe), before)
    assert pipe.facts == KEEP
    pipe.load_lora_weights(good, "one")
    loaded = latents(pipe)
    with pytest.raises(RecipeError, match="an adapter is called 'one' already"):
        pipe.load_lora_weights(good, "one")
    with pytest.raises(AdapterError, match=r"trained with text padding trim, but .* with drop"):
        pipe.load_lora_weights(other)
    with pytest.raises(RecipeError, match="2 weights for 1 adapter"):
        pipe.set_adapters(["one"], [1.0, 2.0])
    with pytest.raises(ModelError, match=r"cannot be saved with them; hint: unload_lora_weights\(\) first"):
        pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(latents(pipe), loaded)
    assert not (tmp_path / "saved").exists()


def test_an_offloaded_transformer_takes_no_adapter(folder: Path, tmp_path: Path) -> None:
    """As after enable_sequential_cpu_offload(): its weights are on "meta" between two steps."""
    pipe = LibreFluxPipeline.from_pretrained(folder)
    pipe.transformer.to("meta")
    with pytest.raises(ModelError, match="offloaded layer by layer; hint: load adapters before"):
        pipe.load_lora_weights(adapter(tmp_path / "a.safetensors"))


def test_the_facts_file_is_written_as_loaded(folder: Path, tmp_path: Path) -> None:
    made = LibreFluxPipeline.from_pretrained(folder)
    made.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "libreflux.json").read_text())["text_padding"] == "keep"

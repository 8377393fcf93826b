"""What is NaN or overflows: no picture, no merged and no exported model, but the file or the option that did it."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from libreflux.adapter.io import attach_file, load_adapter
from libreflux.adapter.merge import merge
from libreflux.cli.train import TrainingDisplay
from libreflux.errors import AdapterError
from libreflux.model.finite import NotFiniteError, is_finite
from libreflux.model.opening import open_model
from libreflux.model.single_file import SingleFiles
from libreflux.model.single_save import save_transformer
from libreflux.recipe import DataSource, Recipe, SampleSpec
from libreflux.sample.pipeline import LibreFluxPipeline
from libreflux.workflows.run_record import RunRecorder
from opened import opened

LAYER = "transformer_blocks.0.attn.to_q"


def written(path: Path, layer: str, height: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    sides = {"lora_A": (4, 32), "lora_B": (height, 4)}
    save_file({f"transformer.{layer}.{k}.weight": torch.randn(v, generator=generator) for k, v in sides.items()}, path)
    return path


@pytest.fixture
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("lora") / "some_lora.safetensors", LAYER, 32)


@pytest.fixture
def wide_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the last layer: what it does is not normalised away."""
    return written(tmp_path_factory.mktemp("lora") / "wide_lora.safetensors", "proj_out", 64)


def one_nan(model: Path, part: str, name: str, out: Path, value: float = float("nan")) -> Path:
    shutil.copytree(model, out)
    [file] = (out / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    return out


def draw(model: Path, change: Callable[[LibreFluxPipeline], object] = lambda pipe: None, **options: Any) -> object:
    pipe = opened(model).pipeline()
    pipe.set_progress_bar_config(disable=True)
    change(pipe)
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0} | options
    return pipe("a fox", seeds=[1], **given)


def poisoned(pipe: LibreFluxPipeline, part: str, name: str, value: float) -> None:
    getattr(pipe, part).get_parameter(name).data.view(-1)[0] = value


PARTS = {
    "transformer": ("proj_out.weight", r"tiny/transformer: proj_out\.weight is not finite"),
    "text_encoder": ("final_layer_norm.weight", "the text encoders: the encoded text is not finite"),
    "text_encoder_2": ("encoder.final_layer_norm.weight", "the text encoders: the encoded text is not finite"),
    "vae": ("decoder.conv_out.weight", r"tiny/vae: decoder\.conv_out\.weight is not finite"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_with_one_number_that_is_none(tiny_model_dir: Path, tmp_path: Path, part: str, value: float) -> None:
    name, words = PARTS[part]
    with pytest.raises(NotFiniteError, match=words) as told:
        draw(tiny_model_dir, lambda pipe: poisoned(pipe, part, name, value))
    assert "; hint: " in str(told.value)
    broken = one_nan(tiny_model_dir, part, name, tmp_path / "broken", value)
    for quantise in (None, True) if part == "transformer" else (None,):
        with pytest.raises(NotFiniteError, match=rf"broken/{part}.*{name} is not finite"):
            opened(broken, quantise=quantise)


@pytest.mark.parametrize("layer", ["attn.to_q", "attn.to_k"])
def test_what_attention_would_swallow(tiny_model_dir: Path, tmp_path: Path, layer: str) -> None:
    """A NaN in q or k leaves finite latents, of another picture: the file is refused when it is opened."""
    name = f"transformer_blocks.0.{layer}.weight"
    broken = one_nan(tiny_model_dir, "transformer", name, tmp_path / "broken")
    with pytest.raises(NotFiniteError, match=name):
        opened(broken)
    single = tmp_path / "one.safetensors"
    shutil.copy(broken / "transformer" / "diffusion_pytorch_model.safetensors", single)
    with pytest.raises(NotFiniteError, match=rf"one\.safetensors: {name}"):
        open_model(SingleFiles(transformer=single, base=str(tiny_model_dir))).load_transformer()


def strengthened(pipe: LibreFluxPipeline, file: Path, weight: float) -> None:
    for layer in attach_file(pipe.transformer, file).layers.values():
        layer.strength = weight  # an adapter of a weight like this is not attached


def test_finite_numbers_that_overflow(tiny_model_dir: Path, wide_lora: Path) -> None:
    for weight, outputs in ((1e38, ("pil", "latent")), (1e30, ("pil",))):  # the second: finite latents, no pixels
        for output in outputs:
            with pytest.raises(NotFiniteError, match=rf"wide_lora\.safetensors at weight {re.escape(f'{weight:g}')}: "):
                draw(tiny_model_dir, functools.partial(strengthened, file=wide_lora, weight=weight), output_type=output)
    with pytest.raises(NotFiniteError, match=r"guidance 1e\+38: the picture overflows"):
        draw(tiny_model_dir, guidance_scale=1e38, num_inference_steps=4)
    draw(tiny_model_dir, lambda pipe: attach_file(pipe.transformer, wide_lora, 2.0), guidance_scale=30.0)  # odd, drawn


@pytest.mark.parametrize("use", ["attach", "merge"])
@pytest.mark.parametrize("inside", [False, True], ids=["the weight", "numbers in the file"])
def test_an_adapter_of_absurd_numbers(tiny_model_dir: Path, lora: Path, use: str, inside: bool) -> None:
    """On q the model's own norms would hide it: 1e30 squared is infinite, and its inverse is 0."""
    if inside:
        save_file({name: 1e15 * tensor for name, tensor in load_file(lora).items()}, lora)
    transformer, weight = opened(tiny_model_dir).transformer, 1.0 if inside else 1e30
    assert transformer is not None
    before = transformer.get_submodule(LAYER).weight.detach().clone()
    with pytest.raises(AdapterError, match=rf"some_lora\.safetensors, {LAYER}: at weight .* which overflows"):
        (attach_file if use == "attach" else merge)(transformer, load_adapter(lora), weight)
    assert torch.equal(transformer.get_submodule(LAYER).weight, before)


def test_an_adapter_that_became_nan_is_named(tiny_model_dir: Path, wide_lora: Path) -> None:
    def attach(pipe: LibreFluxPipeline) -> None:
        adapter = attach_file(pipe.transformer, wide_lora)
        next(adapter.parameters()).data[0, 0] = torch.nan

    with pytest.raises(NotFiniteError, match=r"wide_lora\.safetensors: .*lora_down is not finite"):
        draw(tiny_model_dir, attach)


def test_step_by_step_and_after_the_first_step(tiny_model_dir: Path) -> None:
    pipe = opened(tiny_model_dir).pipeline()
    poisoned(pipe, "transformer", "proj_out.weight", torch.nan)
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(NotFiniteError):
        next(pipe.steps("a fox", seeds=[1], num_inference_steps=9, guidance_scale=1.0))
    assert len(calls) == 1


def test_merging_writes_nothing_that_is_not_finite(tiny_model_dir: Path, lora: Path) -> None:
    broken = opened(tiny_model_dir)
    assert broken.transformer is not None
    broken.transformer.get_submodule(LAYER).weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=rf"some_lora\.safetensors, {LAYER}: the sum is not finite"):
        merge(broken.transformer, load_adapter(lora))
    half = opened(tiny_model_dir)
    assert half.transformer is not None
    half.transformer.half()
    with pytest.raises(NotFiniteError, match=rf"some_lora\.safetensors, {LAYER}: the sum is not finite"):
        merge(half.transformer, load_adapter(lora), 1.5e4)  # fp32 holds the sum, fp16 does not
    assert is_finite(half.transformer.get_submodule(LAYER).weight)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2"])
def test_no_model_is_written_with_nan(tiny_model_dir: Path, tmp_path: Path, part: str) -> None:
    names = {"transformer": "proj_out.weight", "vae": "decoder.conv_out.weight"}
    name = names.get(part, "encoder.final_layer_norm.weight")
    model = opened(tiny_model_dir)
    module = getattr(model.text if part.startswith("text") else model, part)
    module.get_parameter(name).data.view(-1)[0] = torch.nan
    for write in (model.save, model.save_files):
        with pytest.raises(NotFiniteError, match=r"weight is not finite"):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    if part == "transformer":
        with pytest.raises(NotFiniteError, match=r"proj_out\.weight is not finite"):
            save_transformer(model.transformer, model.facts, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_without_a_sheet_that_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow(*_: object) -> None:
        raise NotFiniteError("the picture overflows", where="guidance 1e+38")

    recipe = Recipe(
        model="model",
        data=(DataSource(path="pictures"),),
        resolution=(64,),
        steps=10,
        out=str(tmp_path),
        samples=SampleSpec(prompts=("a fox",)),
    )
    recorder = RunRecorder(recipe, TrainingDisplay())
    monkeypatch.setattr(recorder, "sample_sheet", overflow)
    recorder.on_sample(7, None)
    assert "step 7: no sample sheet: guidance 1e+38: the picture overflows" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

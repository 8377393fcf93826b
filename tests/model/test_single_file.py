"""Single files: BFL's names against diffusers' own converter, ComfyUI's folders, fp8, and what is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from libreflux.errors import ModelError
from libreflux.model.facts import Facts
from libreflux.model.latents import image_ids
from libreflux.model.opening import open_model
from libreflux.model.single_file import SingleFiles, TensorFile, file_config, find_comfyui, load_vae
from libreflux.model.single_save import save_transformer
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from opened import opened
from tiny import make_tiny_model, tiny_transformer, tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("single") / "tiny")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "comfy"
    opened(folder).save_files(out)
    return out


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_comes_back_from_its_files_to_the_bit(folder: Path, files: Path) -> None:
    before, after = opened(folder), opened(find_comfyui(files))
    assert equal(before.transformer, after.transformer)
    assert equal(before.vae, after.vae)
    assert after.facts == before.facts
    mine, yours = (one.text.encode(["a red apple on blue"], padding="drop", max_tokens=64) for one in (before, after))
    assert torch.equal(mine.tokens[0], yours.tokens[0])
    assert torch.equal(mine.pooled, yours.pooled)


def test_without_our_metadata_the_shapes_and_the_base_tell(folder: Path, files: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(next(files.glob("flux1-*"))), bare)
    found = opened(SingleFiles(transformer=bare, base=str(folder)))
    whole = opened(folder)
    assert equal(found.transformer, whole.transformer)
    assert found.facts == whole.facts
    assert dict(found.transformer.config)["axes_dims_rope"] == [4, 6, 6]


def test_one_file_with_everything(folder: Path, files: Path, tmp_path: Path) -> None:
    prefixes = {
        "flux1-tiny": "model.diffusion_model.",
        "ae": "vae.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    }
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, prefix in prefixes.items():
        part = files / f"{name}.safetensors"
        tensors |= {prefix + key: tensor for key, tensor in load_file(part).items()}
        metadata |= TensorFile(part, "transformer").metadata
    save_file(tensors, tmp_path / "all.safetensors", metadata)
    found, whole = opened(SingleFiles(transformer=tmp_path / "all.safetensors", base=str(folder))), opened(folder)
    assert equal(found.transformer, whole.transformer)
    assert equal(found.vae, whole.vae)
    assert equal(found.text.text_encoder_2, whole.text.text_encoder_2)


def test_diffusers_reads_our_single_file_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # its converter knows only FLUX's own width, 3072
    try:
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for _, parameter in flux.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 1, 0.1)
    one = tmp_path / "flux1-one.safetensors"
    save_transformer(flux, Facts(guidance_embeds=True), one)
    config = tmp_path / "config"
    flux.save_config(config)
    theirs = FluxTransformer2DModel.from_single_file(one, config=str(config), torch_dtype=torch.bfloat16)
    assert equal(theirs, flux)
    ours = open_model(SingleFiles(transformer=one)).load_transformer()
    assert equal(ours, flux)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(one), bare)
    told = open_model(SingleFiles(transformer=bare)).load_transformer()
    assert equal(told, flux)
    public = [{k: v for k, v in one.config.items() if not k.startswith("_")} for one in (told, flux)]
    assert public[0] == public[1]


def test_the_vae_is_what_diffusers_reads(files: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(dict(tiny_vae().config) | {"mid_block_add_attention": True}).eval()
    tiny_vae().save_config(tmp_path / "config")
    vae.save_config(tmp_path / "config")
    whole = opened(find_comfyui(files))
    whole.vae = vae
    whole.save_files(tmp_path / "out")
    ae = tmp_path / "out" / "ae.safetensors"
    stored = load_file(ae)
    assert stored["decoder.mid.attn_1.q.weight"].ndim == 4
    theirs = AutoencoderKL.from_single_file(ae, config=str(tmp_path / "config"))
    file = TensorFile(ae, "vae")
    assert equal(theirs, vae)
    assert equal(load_vae(file, file_config(file, "vae")), vae)


def test_fp8_with_and_without_scales(files: Path, tmp_path: Path) -> None:
    tensors = load_file(next(files.glob("flux1-*")))
    name = "single_blocks.0.linear2"
    dense = tensors[f"{name}.weight"]
    scale = dense.abs().max() / 448
    metadata = TensorFile(next(files.glob("flux1-*")), "transformer").metadata
    for marks, expected in (
        ({f"{name}.scale_weight": scale, f"{name}.scale_input": scale.clone(), "scaled_fp8": torch.zeros(2)}, dense),
        ({}, dense / scale),
    ):
        path = tmp_path / f"fp8-{len(marks)}.safetensors"
        eight = (dense / scale).to(torch.float8_e4m3fn)
        save_file({**tensors, f"{name}.weight": eight, **marks}, path, metadata)
        read = open_model(SingleFiles(transformer=path)).load_transformer()
        weight = read.get_submodule("single_transformer_blocks.0.proj_out").weight
        assert weight.dtype == torch.float32  # as most of the file
        torch.testing.assert_close(weight.float(), expected, rtol=0.07, atol=float(expected.abs().max()) / 400)


def test_int8_from_a_single_file_is_int8_of_the_folder(folder: Path, files: Path, tmp_path: Path) -> None:
    ours = open_model(SingleFiles(transformer=next(files.glob("flux1-*")))).load_transformer(quantise=True)
    theirs = open_model(folder).load_transformer(quantise=True)
    assert equal(ours, theirs)
    opened(find_comfyui(files), quantise=True).save(tmp_path / "int8")
    again = open_model(tmp_path / "int8").load_transformer()
    assert equal(again, theirs)


def test_the_largest_text_encoder_is_taken_and_named(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "t5xxl_fp8.safetensors").write_bytes(b"small")
    (tmp_path / "aesthetic.safetensors").write_bytes(bytes(10_000_000))
    found = find_comfyui(tmp_path)
    assert found.vae == tmp_path / "ae.safetensors"
    assert found.text_encoder_2 == tmp_path / "t5xxl.safetensors"
    assert "t5xxl.safetensors" in caplog.text
    (tmp_path / "flux1-other.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"2 files are called flux1.*`model`"):
        find_comfyui(tmp_path)


def broken(files: Path, case: str) -> dict[str, torch.Tensor]:
    tensors = load_file(next(files.glob("flux1-*")))
    if case == "missing":
        del tensors["img_in.bias"]
    elif case == "left over":
        tensors["single_blocks.0.linear3.weight"] = torch.zeros(2, 2)
    elif case == "another shape":
        tensors["single_blocks.1.linear1.weight"] = torch.zeros(5, 5)
    elif case == "bitsandbytes":
        tensors["img_in.weight.absmax"] = torch.zeros(2)
    else:
        tensors = {"conv_in.weight": torch.zeros(4, 4)}
    return tensors


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "missing keys: img_in.bias"),
        ("left over", r"unexpected keys: single_blocks.0.linear3"),
        ("another shape", r"single_blocks.1.linear1.weight has shape"),
        ("bitsandbytes", "quantised by bitsandbytes"),
        ("another model", "not a FLUX.1 transformer"),
    ],
)
def test_files_that_do_not_fit_are_named(files: Path, tmp_path: Path, case: str, words: str) -> None:
    metadata = TensorFile(next(files.glob("flux1-*")), "transformer").metadata if case != "another model" else None
    path = tmp_path / "wrong.safetensors"
    save_file(broken(files, case), path, metadata)
    with pytest.raises(ModelError, match=words) as told:
        open_model(SingleFiles(transformer=path)).load_transformer()
    assert "wrong.safetensors" in str(told.value)
    assert "hint" in str(told.value)


def test_what_no_file_has_is_asked_for(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no text_encoder in this file; hint: name with `base`"):
        open_model(SingleFiles(transformer=next(files.glob("flux1-*")))).load_text()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(next(files.glob("flux1-*")).read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be read"):
        open_model(SingleFiles(transformer=cut))


def test_velocity_of_a_dev_like_file(tmp_path: Path) -> None:

    flux = tiny_transformer(guidance_embeds=True)
    save_transformer(flux, Facts(guidance_embeds=True), tmp_path / "dev.safetensors")
    read = open_model(SingleFiles(transformer=tmp_path / "dev.safetensors")).load_transformer()
    text = TextConditioning([torch.randn(5, 24)], torch.randn(1, 16))
    x, sigma = torch.randn(1, 4, 64), torch.tensor([0.5])
    one, other = (velocity(each, x, sigma, text, image_ids(4, 4), guidance=3.0) for each in (flux, read))
    assert torch.equal(one, other)
    assert json.loads(TensorFile(tmp_path / "dev.safetensors", "transformer").metadata["libreflux"])["schema"] == 1

"""Opening and saving: folders that diffusers loads too, facts, and one clear line for every wrong model."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from libreflux.errors import ModelError, RunError
from libreflux.model.facts import KNOWN, Facts, find_facts, read_facts, write_facts
from libreflux.model.latents import image_ids
from libreflux.model.locate import locate
from libreflux.model.opening import open_model
from libreflux.model.save import LiveParts, save_model
from libreflux.model.source import weights_hash
from libreflux.model.velocity import velocity
from opened import opened
from tiny import tiny_transformer


@pytest.fixture
def copy_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def test_a_saved_model_opens_equal_and_in_diffusers(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = opened(tiny_model_dir)
    with torch.no_grad():
        model.transformer.proj_out.bias += 1  # a model that differs from the folder it came from
    model.facts = dataclasses.replace(model.facts, steps=7, lineage={"base": "tiny"})
    again = opened(model.save(tmp_path / "saved"))
    pipe = FluxPipeline.from_pretrained(tmp_path / "saved")
    assert again.facts == model.facts == read_facts(tmp_path / "saved")
    for ours, back, theirs in (
        (model.transformer, again.transformer, pipe.transformer),
        (model.vae, again.vae, pipe.vae),
        (model.text.text_encoder, again.text.text_encoder, pipe.text_encoder),
        (model.text.text_encoder_2, again.text.text_encoder_2, pipe.text_encoder_2),
    ):
        assert ours.state_dict().keys() == back.state_dict().keys() == theirs.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name])
            assert torch.equal(tensor, theirs.state_dict()[name])

    # Without padding, diffusers' prompts and transformer give our velocity.
    prompt = "a fox on blue"
    text = again.text.encode([prompt], padding="drop", max_tokens=512)
    embeds, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=text.lengths[0])
    packed, ids, sigma = torch.randn(1, 4, 64), image_ids(4, 4), torch.tensor([0.3])
    with torch.no_grad():
        expected = pipe.transformer(packed, embeds, pooled, sigma, ids, torch.zeros(embeds.shape[1], 3)).sample
    torch.testing.assert_close(velocity(again.transformer, packed, sigma, text, ids), expected, atol=1e-5, rtol=0)


def test_parts_not_opened_are_copied(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = open_model(tiny_model_dir)
    live = LiveParts(transformer=model.load_transformer())
    out = save_model(tmp_path / "deep" / "out", model.facts, live, model)
    for file in sorted(tiny_model_dir.rglob("*.safetensors")):
        name = file.relative_to(tiny_model_dir)
        ours, theirs = load_file(out / name), load_file(file)
        assert ours.keys() == theirs.keys(), name
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), name
    opened(out)


def test_no_saved_file_says_where_a_part_was_read_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    earlier = Path(shutil.copytree(tiny_model_dir, tmp_path / "earlier"))
    config = earlier / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": f"{tiny_model_dir}/vae"}))
    source = open_model(earlier)
    copied = save_model(tmp_path / "copied", source.facts, LiveParts(transformer=source.load_transformer()), source)
    assert "_name_or_path" not in json.loads((copied / "vae" / "config.json").read_text())
    out = opened(tiny_model_dir).save(tmp_path / "out")
    told = [file.name for file in out.rglob("*.json") if str(tiny_model_dir) in file.read_text("utf-8")]
    assert not told
    assert open_model(out).load_vae().config["_name_or_path"] == out / "vae"  # errors name it


def test_saving_is_all_or_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = open_model(tiny_model_dir)
    live = LiveParts(transformer=model.load_transformer())
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="already exists"):
        save_model(tmp_path / "taken", model.facts, live, model)
    with pytest.raises(ModelError, match="has no vae to save"):
        save_model(tmp_path / "out", model.facts, live)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_dtype_is_kept_or_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = opened(tiny_model_dir, dtype=torch.bfloat16).save(tmp_path / "half")
    kept = opened(out)
    parts = (kept.transformer, kept.vae, kept.text.text_encoder, kept.text.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())
    wide = open_model(out).load_transformer(dtype=torch.float32)
    assert wide.dtype == torch.float32


def test_weights_hash_tells_weights_apart(copy_dir: Path, tiny_model_dir: Path) -> None:
    assert weights_hash(copy_dir) == weights_hash(tiny_model_dir)
    tiny_transformer(seed=1).save_pretrained(copy_dir / "transformer")
    assert weights_hash(copy_dir) != weights_hash(tiny_model_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("emoji-bass", "no such model: emoji-bass; hint: did you mean emoji-base"),
        ("nothing", "no such model: nothing; hint: use emoji-base, an existing folder, or a hub id"),
        ("./runs/nothing", "no such model"),
        ("/runs/nothing", "no such model"),
        ("a/b/c", "no such model"),
        ("org/", "no such model"),
        ("", "no model is named"),
        ("nobody/nothing", "nobody/nothing: no folder of this name, and it cannot be had from the hub"),
        ("nobody/nothing@main", "it cannot be had from the hub"),
    ],
)
def test_wrong_names_give_one_line(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        locate(name)
    assert "hint: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_typo_below_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="no such model: runs/frist"):
        locate("runs/frist")


def test_what_is_no_model_folder(tmp_path: Path, copy_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        locate(tmp_path)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ModelError, match="is a single file; hint: `libreflux export"):
        locate(tmp_path / "x.safetensors")
    shutil.rmtree(copy_dir / "vae")
    with pytest.raises(ModelError, match="has no vae folder"):
        locate(copy_dir)


def test_damage_is_named(copy_dir: Path) -> None:
    weights = copy_dir / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    with pytest.raises(ModelError, match=r"copy/transformer/.*safetensors: cannot be loaded .*; hint: "):
        opened(copy_dir)

    weights.write_bytes(whole)
    tensors = load_file(weights)
    bias = tensors.pop("proj_out.bias")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys: proj_out\.bias"):
        opened(copy_dir)
    save_file({**tensors, "proj_out.bias": bias, "stray.weight": bias.clone()}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected keys: stray\.weight"):
        opened(copy_dir)
    save_file({**tensors, "proj_out.bias": bias[:8].clone()}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"copy/transformer: "):
        opened(copy_dir)
    weights.write_bytes(whole)
    opened(copy_dir)

    clip = copy_dir / "text_encoder" / "model.safetensors"
    tensors = load_file(clip)
    lost = next(name for name in tensors if "final_layer_norm" in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, clip, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"copy/text_encoder: missing keys: .*final_layer_norm"):
        open_model(copy_dir).load_text()
    (copy_dir / "transformer" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: cannot be loaded"):
        open_model(copy_dir)


def test_another_kind_of_transformer_is_refused(copy_dir: Path) -> None:
    path = copy_dir / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(
        ModelError, match=r"its transformer is a SD3Transformer2DModel; hint: use a model of the FLUX\.1"
    ):
        open_model(copy_dir)


def test_facts_round_trip(tmp_path: Path) -> None:
    facts = Facts(text_padding="trim", max_tokens=256, guidance=2.5, shift=None, licence="mit", lineage={"a": [1]})
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'"),
        ({"steps": None}, "steps has the wrong type"),
        ({"steps": 0}, "steps cannot be 0"),
        ({"steps": True}, "steps has the wrong type"),
        ({"text_padding": "dorp"}, "text_padding cannot be 'dorp'"),
        ({"guidance": -1}, "guidance cannot be -1"),
        ({"shift": 0}, "shift cannot be 0"),
        ({"schema": 2}, "schema 2 is not 1; hint: update libreflux"),
    ],
)
def test_wrong_facts_are_named(copy_dir: Path, change: dict, message: str) -> None:
    path = copy_dir / "libreflux.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message) as caught:
        open_model(copy_dir)
    assert str(path) in str(caught.value)


def test_missing_and_broken_facts(copy_dir: Path) -> None:
    path = copy_dir / "libreflux.json"
    values = json.loads(path.read_text())
    del values["licence"]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="key 'licence' is missing"):
        open_model(copy_dir)
    path.write_text("not json")
    with pytest.raises(ModelError, match="unreadable"):
        open_model(copy_dir)
    path.write_text(json.dumps(values | {"licence": "mit", "guidance_embeds": True}))
    with pytest.raises(ModelError, match=r"guidance_embeds in libreflux\.json is not the transformer's"):
        open_model(copy_dir)


def test_facts_of_foreign_models(copy_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A known hub id has its row; an unknown model has the nearest one, and says so."""
    (copy_dir / "libreflux.json").unlink()
    schnell = KNOWN["black-forest-labs/FLUX.1-schnell"]
    assert find_facts("Black-Forest-Labs/FLUX.1-schnell@abc", copy_dir, guidance_embeds=False) is schnell
    assert find_facts("jimmycarter/LibreFLUX", copy_dir, guidance_embeds=False).text_padding == "bias"
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert open_model(copy_dir).facts == schnell
    assert "taken for a model like FLUX.1-schnell" in caplog.text
    dev = find_facts("x", copy_dir, guidance_embeds=True)
    assert dev.guidance_embeds
    assert dev.shift is None
    assert dev.max_tokens == 512
    assert find_facts("jimmycarter/LibreFLUX", copy_dir, guidance_embeds=False, masked=True).text_padding == "bias"
    assert "like LibreFLUX" not in caplog.text
    assert find_facts("y", copy_dir, guidance_embeds=False, masked=True) == KNOWN["jimmycarter/LibreFLUX"]
    assert "y has no libreflux.json: taken for a model like LibreFLUX" in caplog.text


def test_a_model_takes_the_parts_it_lacks_from_the_folder_that_its_facts_name(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from libreflux.data.digests import FileMemory, encoder_digests

    shutil.copytree(tiny_model_dir, tmp_path / "whole")
    lean = tmp_path / "lean"
    shutil.copytree(tiny_model_dir / "transformer", lean / "transformer")
    shutil.copyfile(tiny_model_dir / "model_index.json", lean / "model_index.json")
    write_facts(lean, dataclasses.replace(read_facts(tiny_model_dir), parts_from="whole"))

    ours, whole = opened(lean), opened(tmp_path / "whole")
    for part, other in ((ours.vae, whole.vae), (ours.text.text_encoder_2, whole.text.text_encoder_2)):
        assert all(torch.equal(a, b) for a, b in zip(part.parameters(), other.parameters(), strict=True))
    encoded = [each.text.encode(["a cat"], padding="drop", max_tokens=512).pooled for each in (ours, whole)]
    assert torch.equal(*encoded)
    assert ours.scheduler.config.shift == whole.scheduler.config.shift
    memory = FileMemory(tmp_path / "memory")
    assert encoder_digests(lean, memory) == encoder_digests(tmp_path / "whole", memory)

    lean_source = open_model(lean)
    live = LiveParts(transformer=lean_source.load_transformer())
    saved = save_model(tmp_path / "elsewhere" / "saved", lean_source.facts, live, lean_source)
    assert read_facts(saved).parts_from is None
    open_model(saved).load_vae()

    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(ModelError, match="it has no vae folder"):
        locate(lean)
    for wrong in ("../whole", "..", "a/b", ""):
        write_facts(lean, dataclasses.replace(read_facts(tiny_model_dir), parts_from=wrong))
        with pytest.raises(ModelError, match="parts_from cannot be"):
            locate(lean)


@pytest.mark.parametrize(("suffix", "told"), [(".ckpt", "pickle"), (".pt", "pickle"), (".gguf", "GGUF is not read")])
def test_pickles_and_gguf_are_refused_by_name(copy_dir: Path, tmp_path: Path, suffix: str, told: str) -> None:
    (tmp_path / f"flux{suffix}").write_bytes(b"x")
    with pytest.raises(ModelError, match=told):
        locate(tmp_path / f"flux{suffix}")
    weights = copy_dir / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(suffix))
    with pytest.raises(ModelError, match=f"transformer: has no safetensors: .*{told}"):
        locate(copy_dir)


def _lie(data: bytes) -> bytes:
    return (2**40).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize("broken", [lambda data: b"", lambda data: data[: len(data) // 2], _lie])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2"])
def test_a_broken_file_is_one_line_with_its_place(
    copy_dir: Path, part: str, broken: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (file,) = (copy_dir / part).glob("*.safetensors")
    file.write_bytes(broken(file.read_bytes()))
    with pytest.raises(ModelError, match=rf"{part}/{file.name}: cannot be loaded") as told:
        opened(copy_dir)
    assert "\n" not in str(told.value)
    assert "hint: " in str(told.value)

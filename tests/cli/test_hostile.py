"""A damaged or hostile model: `generate` says what, where and the hint on one line, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save

from cli.refusing import refused, replaced
from libreflux.emoji.build.tokenizers import build_clip_tokenizer
from libreflux.model import int8_files
from libreflux.model.quantise import quantise_folder
from opened import opened
from tiny import CAPTIONS, make_published_layout, tiny_transformer, tiny_vae

Damage = Callable[[Path], object]
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
WEIGHTS = {"transformer": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": TRANSFORMERS, "text_encoder_2": TRANSFORMERS}


@pytest.fixture(scope="module")
def layouts(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model with one file a part, in shards with indexes, and in int8 shards; tests hard-link them."""
    root = tmp_path_factory.mktemp("layouts")
    dense = opened(tiny_model_dir)
    sharded = Path(shutil.copytree(tiny_model_dir, root / "sharded"))
    parts = (("transformer", dense.transformer, "60KB"), ("text_encoder_2", dense.text.text_encoder_2, "20KB"))
    for part, live, size in parts:
        (sharded / part / WEIGHTS[part]).unlink()
        live.save_pretrained(sharded / part, max_shard_size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_files, "SHARD_BYTES", 40_000)
        int8 = quantise_folder(tiny_model_dir, root / "int8")
    found = {"whole": tiny_model_dir, "sharded": sharded, "int8": int8}
    found["LibreFLUX"] = make_published_layout(tiny_model_dir, root / "LibreFLUX")
    for name, guidance_embeds in (("schnell", False), ("dev", True)):
        found[name] = root / name
        shutil.copytree(tiny_model_dir, root / name, ignore=shutil.ignore_patterns("libreflux.json", "transformer"))
        tiny_transformer(guidance_embeds=guidance_embeds).save_pretrained(root / name / "transformer")
    return found


def edited(file: Path, change: Callable[[Any], object]) -> None:
    """The JSON in a file after `change`, which works in place or returns another."""
    values = json.loads(file.read_text())
    replaced(file, json.dumps(change(values) or values))


def config(part: str, **values: Any) -> Damage:
    return lambda folder: edited(folder / part / "config.json", lambda old: old | values)


def written(part: str, text: bytes | str) -> Damage:
    return lambda folder: replaced(folder / part / "config.json", text)


def without(name: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / name)


def emptied(name: str) -> Damage:
    def damage(folder: Path) -> None:
        for file in (folder / name).iterdir():
            file.unlink()

    return damage


def weights(part: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / part / WEIGHTS[part]
        replaced(file, change(file.read_bytes()))

    return damage


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A safetensors file whose JSON header says something else of the same data."""

    def changed(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        values = json.loads(data[8 : 8 + size])
        change(values)
        text = json.dumps(values).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return changed


def past_the_end(values: dict[str, Any]) -> None:
    last = max((name for name in values if name != "__metadata__"), key=lambda name: values[name]["data_offsets"][1])
    values[last]["data_offsets"][1] += 4096
    values[last]["shape"] = [(values[last]["data_offsets"][1] - values[last]["data_offsets"][0]) // 4]


FILES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "header of a terabyte": lambda data: (2**40).to_bytes(8, "little") + data[8:],
    "header longer than the file": lambda data: len(data).to_bytes(8, "little") + data[8:],
    "data past the end": header(past_the_end),
}


def pickled(part: str, name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / part / WEIGHTS[part]).unlink()
        torch.save({"weight": torch.zeros(1)}, folder / part / name)

    return damage


def index(part: str, change: Callable[[dict[str, str], Path], object]) -> Damage:
    """`change(weight_map, folder)` of a part's index."""

    def damage(folder: Path) -> None:
        (file,) = (folder / part).glob("*.index.json")
        edited(file, lambda values: change(values["weight_map"], folder))

    return damage


def lost_shard(weight_map: dict[str, str], folder: Path) -> None:
    part = "transformer" if weight_map.keys() & {"proj_out.bias"} else "text_encoder_2"
    (folder / part / min(weight_map.values())).unlink()


def outside(weight_map: dict[str, str], folder: Path) -> None:
    name = min(weight_map)
    shutil.copyfile(next(folder.glob(f"*/{weight_map[name]}")), folder.parent / "x")
    weight_map[name] = "../../x"


def pickled_shard(weight_map: dict[str, str], folder: Path) -> None:
    weight_map[min(weight_map)] = "model.bin"


def less(weight_map: dict[str, str], folder: Path) -> None:
    del weight_map[max(weight_map)]


def many_tokens(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    build_clip_tokenizer([f"{CAPTIONS} {a}{b}" for a in "qzxjkw" for b in "qzxjkw"], folder / "tokenizer", 700)


def other_vae(folder: Path) -> None:
    made = AutoencoderKL.from_config(tiny_vae().config, latent_channels=8)
    replaced(folder / "vae" / DIFFUSERS, save(made.state_dict()))
    edited(folder / "vae" / "config.json", lambda old: old | {"latent_channels": 8})


DAMAGED: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    **{
        f"{part}: {what}": ("whole", weights(part, change), (f"/{part}/{WEIGHTS[part]}: cannot be loaded",))
        for part in WEIGHTS
        for what, change in FILES.items()
        if part == "transformer" or what == "truncated"
    },
    **{
        f"{part}: a pickle": ("whole", pickled(part, name), (f"/{part}: ", "is a pickle, which runs code"))
        for part, name in (
            ("transformer", "diffusion_pytorch_model.bin"),
            ("vae", "diffusion_pytorch_model.bin"),
            ("text_encoder", "pytorch_model.bin"),
            ("text_encoder_2", "pytorch_model.bin"),
        )
    },
    **{
        f"{layout} {part}: {what}": (layout, index(part, change), (f"/{part}", *told))
        for layout, part in (("sharded", "transformer"), ("sharded", "text_encoder_2"), ("int8", "transformer"))
        for what, change, told in (
            ("a lost shard", lost_shard, ("-00001-of-0000",)),
            ("a shard outside", outside, ("'../../x'", "no safetensors file in its folder")),
            ("a tensor that the index lacks", less, ("missing keys: ",)),
            ("a shard in a pickle", pickled_shard, ("'model.bin'", "no safetensors file in its folder")),
            ("no table", lambda table, folder: {"weight_map": [1]}, (".index.json", "weight_map")),
            ("no names", lambda table, folder: {"weight_map": dict.fromkeys(table, 7)}, (".index.json", "weight_map")),
        )
    },
    **{
        f"{part}: {what}": ("whole", written(part, text), (f"/{part}/config.json: cannot be loaded",))
        for part in WEIGHTS
        for what, text in (("config no JSON", "{"), ("config no object", "[1]"), ("config binary", b"\x80\x02"))
        if part == "transformer" or what == "config no object"
    },
    **{
        f"{part}: config {values}": ("whole", config(part, **values), (f"/{part}",))
        for part, values in (
            ("transformer", {"num_layers": 10**9}),
            ("transformer", {"num_attention_heads": 10**9}),
            ("transformer", {"attention_head_dim": -1}),
            ("transformer", {"in_channels": 10**15}),
            ("transformer", {"joint_attention_dim": "24"}),
            ("vae", {"layers_per_block": 10**9}),
            ("vae", {"block_out_channels": [10**9] * 4}),
            ("vae", {"latent_channels": 0}),
            ("text_encoder", {"num_hidden_layers": 10**9}),
            ("text_encoder", {"hidden_size": 10**12}),
            ("text_encoder", {"num_attention_heads": 0}),
            ("text_encoder_2", {"num_layers": 10**9}),
            ("text_encoder_2", {"vocab_size": 10**15}),
            ("text_encoder_2", {"d_ff": -4}),
            ("text_encoder_2", {"_attn_implementation": "someone/kernel"}),
            ("vae", {"latent_channels": 4}),
        )
    },
    **{
        f"no {name}": ("whole", without(name), told)
        for name, told in (
            ("tokenizer", ("/tokenizer: no such folder",)),
            ("tokenizer_2", ("/tokenizer_2: no such folder",)),
            ("text_encoder", ("/text_encoder: no such folder",)),
            ("text_encoder_2", ("/text_encoder_2: no such folder",)),
            ("vae", ("it has no vae folder",)),
            ("transformer", ("it has no transformer folder",)),
        )
    },
    **{
        f"axes {axes}": ("whole", config("transformer", axes_dims_rope=axes), ("embedding and of a head differ",))
        for axes in ([4, 6, 8], [3, 6, 7])
    },
    "no model_index.json": (
        "whole",
        lambda folder: (folder / "model_index.json").unlink(),
        ("it has no model_index.json",),
    ),
    "tokenizer: broken": (
        "whole",
        lambda folder: replaced(folder / "tokenizer" / "tokenizer.json", "{"),
        ("/tokenizer: cannot be",),
    ),
    "tokenizer_2: empty": (
        "whole",
        emptied("tokenizer_2"),
        ("/tokenizer_2: has no tokenizer.json and no spiece.model",),
    ),
    "tokenizer of another model": ("whole", many_tokens, ("/tokenizer: knows ",)),
    "vae of another model": ("whole", other_vae, ("channels of transformer and VAE differ: 64 and 32",)),
    "an adapter for a text encoder": (
        "whole",
        lambda folder: (folder / "text_encoder_2" / "adapter_config.json").write_text("{}"),
        ("/text_encoder_2: is an adapter",),
    ),
    "scheduler: timesteps without end": (
        "whole",
        lambda folder: edited(
            folder / "scheduler" / "scheduler_config.json", lambda old: old | {"num_train_timesteps": 10**12}
        ),
        ("/scheduler: num_train_timesteps cannot be 1000000000000",),
    ),
    "scheduler: broken": (
        "whole",
        lambda folder: replaced(folder / "scheduler" / "scheduler_config.json", "{"),
        ("/scheduler_config.json: cannot be loaded",),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model(libreflux: Callable, layouts: dict[str, Path], tmp_path: Path, case: str) -> None:
    layout, damage, parts = DAMAGED[case]
    model, cwd = tmp_path / "model", tmp_path / "cwd"
    shutil.copytree(layouts[layout], model, copy_function=os.link)
    cwd.mkdir()
    damage(model)
    if layout == "int8":  # who damages a model on purpose can write its checksums too
        int8_files.write_all_checksums(model)
    before = sorted(tmp_path.rglob("*"))
    refused(libreflux(cwd, "generate", "a fox", "--model", model, "--steps", "1"), parts)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("layout", ["whole", "sharded", "int8", "LibreFLUX", "schnell", "dev"])
def test_what_is_not_damaged_is_drawn_without_the_network(
    libreflux: Callable, layouts: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    code, out, err = libreflux(tmp_path, "generate", "a fox", "--model", layouts[layout], "--steps", "1")
    assert (code, out.strip()) == (0, "out/001-a-fox-seed0.png"), err
    notices = [line for line in err.splitlines() if not line.startswith("drawing: ")]
    unknown = "" if layout in ("whole", "sharded", "int8") else layout
    assert [line.split(": taken for a model like ")[1].removeprefix("FLUX.1-") for line in notices] == unknown.split()


def test_a_hub_id_asks_the_network(libreflux: Callable, tmp_path: Path) -> None:
    code, _, err = libreflux(tmp_path, "generate", "a fox", "--model", "nobody/nothing")
    assert code == 97, err
    assert err.startswith("socket.getaddrinfo"), err

"""A complete FLUX-shaped model with random weights, small enough for a test: real classes, a real folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from libreflux.data.shards import set_sums, shard_sums
from libreflux.emoji.build.tokenizers import build_clip_tokenizer, build_t5_tokenizer

CAPTIONS = [
    "a red apple on blue",
    "a fox left of a rocket, on yellow",
    "apple, red, blue background",
    "a small green frog sits under a tall tree, and the sky behind it is a calm and even orange",
]

INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

FACTS = {
    "schema": 1,
    "text_padding": "drop",
    "max_tokens": 512,
    "steps": 4,
    "guidance": 3.0,
    "shift": 1.0,
    "guidance_embeds": False,
    "licence": "apache-2.0",
    "lineage": {},
}


def tiny_transformer(seed: int = 0, guidance_embeds: bool = False) -> FluxTransformer2DModel:
    """1 double + 2 single blocks, 2 heads x 16, text 24 wide, pooled 16 wide, 16 latent channels."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    ).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """16 latent channels, 8 pixels per latent, FLUX's scale and shift, 32 px by default."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def make_tiny_model(path: Path, seed: int = 0) -> Path:
    """Write the model into `path` (created) and return it: seven parts, model_index.json, libreflux.json."""
    path.mkdir(parents=True, exist_ok=True)
    t5_tokenizer = build_t5_tokenizer(CAPTIONS, path / "tokenizer_2", 256)
    clip_tokenizer = build_clip_tokenizer(CAPTIONS, path / "tokenizer", 640)
    tiny_transformer(seed).save_pretrained(path / "transformer")
    tiny_vae(seed).save_pretrained(path / "vae")
    torch.manual_seed(seed)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=3,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    t5.save_pretrained(path / "text_encoder_2")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            initializer_factor=20.0,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    clip.save_pretrained(path / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    (path / "libreflux.json").write_text(json.dumps(FACTS, indent=2))
    return path


def make_published_layout(tiny: Path, out: Path) -> Path:
    """The tiny model as LibreFLUX was published: its own classes, whose code raises, in 3 shards, and no facts."""
    shutil.copytree(tiny, out, ignore=shutil.ignore_patterns("libreflux.json", "transformer"))
    FluxTransformer2DModel.from_pretrained(tiny / "transformer").save_pretrained(
        out / "transformer", max_shard_size="150KB"
    )
    code = "raise SystemExit('the code of the model was run')"
    classes = {"transformer": "FluxTransformer2DModelWithMasking", "pipeline": "LibreFluxPipeline"}
    (out / "transformer" / "transformer.py").write_text(code)
    (out / "pipeline.py").write_text(code)
    for name, change in (
        ("transformer/config.json", {"_class_name": classes["transformer"]}),
        (
            "model_index.json",
            {"_class_name": ["pipeline", classes["pipeline"]], "transformer": ["transformer", classes["transformer"]]},
        ),
    ):
        (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | change))
    return out


def poison_latents(cache: Path, pictures: int | None = None) -> list[str]:
    """Make the latents of some (None: all) prepared pictures of a cache NaN, in place, and return the pictures' ids."""
    [shard] = cache.glob("shards/latents-*.safetensors")
    tensors, size = load_file(shard), shard.stat().st_size
    names = sorted(tensors)[:pictures]
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan) for name in names}, shard, {"schema": "1"})
    assert shard.stat().st_size == size  # or the index would call it damaged
    sum_again(shard)
    return sorted({name.split("/")[0] for name in names})


def sum_again(shard: Path) -> None:
    """Gives a cache's shard the checksums of what is in it now."""
    with contextlib.closing(sqlite3.connect(shard.parent.parent / "index.sqlite3")) as index, index:
        [number] = index.execute("SELECT number FROM shards WHERE name = ?", (shard.name,)).fetchone()
        set_sums(index, number, shard.name, shard.stat().st_size, shard_sums(shard))


def change_json(path: Path, **changes: object) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path) -> None:
    """Every number of a part's one file of weights, 1 % larger."""
    [file] = folder.glob("*.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


DECIDING = {
    "transformer": lambda model: change_weights(model / "transformer"),
    "transformer's configuration": lambda model: change_json(
        model / "transformer" / "config.json", axes_dims_rope=[6, 4, 6]
    ),
    "VAE": lambda model: change_weights(model / "vae"),
    "VAE's configuration": lambda model: change_json(model / "vae" / "config.json", scaling_factor=0.5),
    "CLIP": lambda model: change_weights(model / "text_encoder"),
    "T5": lambda model: change_weights(model / "text_encoder_2"),
    "tokenizer": lambda model: change_json(model / "tokenizer_2" / "tokenizer_config.json", another="setting"),
    "shift": lambda model: change_json(model / "libreflux.json", shift=3.0),
    "tokens": lambda model: change_json(model / "libreflux.json", max_tokens=256),
    "padding": lambda model: change_json(model / "libreflux.json", text_padding="trim"),
}
"""What decides the pictures of a tiny model that lies in a folder of its own, each with a change of it."""
UNDECIDING = {
    "licence": lambda model: change_json(model / "libreflux.json", licence="mit", lineage={"base": "elsewhere"}),
    "library": lambda model: change_json(
        model / "transformer" / "config.json", _diffusers_version="0.99", _name_or_path="elsewhere"
    ),
    "picture of the model": lambda model: (model / "README.md").write_text("A model."),
}
"""What does not."""

"""A model of tiny's kind, large enough that it matters what of it is on the card: 250 MB transformer, 120 MB T5."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tiny import make_tiny_model


def build(out: str) -> None:
    """Writes it: the tiny model's folder with another transformer and another T5, in bf16 with random weights."""
    path = make_tiny_model(Path(out))
    config = T5Config.from_pretrained(path / "text_encoder_2")
    wide = {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 6}
    t5 = T5EncoderModel(T5Config(**{**config.to_dict(), **wide}))
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=8,
        joint_attention_dim=768,
        pooled_projection_dim=16,
        axes_dims_rope=(16, 56, 56),
        guidance_embeds=False,
    )
    for part, name in ((t5, "text_encoder_2"), (transformer, "transformer")):
        shutil.rmtree(path / name)
        part.to(torch.bfloat16).save_pretrained(path / name)

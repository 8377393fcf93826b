"""Pictures of text in a font that ships with matplotlib, and a tiny random CLIP with both towers and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"


def sign(lines: Sequence[str], *, side: int = 256, size: int = 28, step: int = 60) -> Image.Image:
    """Black lines on white, one below the other."""
    picture = Image.new("RGB", (side, side), "white")
    for number, line in enumerate(lines):
        place = (side // 16, side // 16 + step * number)
        ImageDraw.Draw(picture).text(place, line, font=ImageFont.truetype(str(FONT), size), fill="black")
    return picture


def make_tiny_clip(folder: Path, tokenizer: Path) -> Path:
    """32 pixels, cropped from 36; features of 8 numbers; random weights with a tokenizer that is there already."""
    words = CLIPTokenizer.from_pretrained(tokenizer)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text = {**width, **tokens, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**width, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder

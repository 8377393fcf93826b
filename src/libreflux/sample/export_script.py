"""The same pictures without libreflux: a script for diffusers, a workflow for ComfyUI."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from libreflux.flow.schedule import DEV_SHIFT
from libreflux.model.facts import Facts

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

_SCRIPT = '''"""Draws with this model in diffusers alone, the picture that `libreflux generate` draws of the same seed.

{about}
In bf16 the last digits differ: diffusers rounds each step's sigma to the model's dtype, libreflux does not.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from diffusers import FluxPipeline

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--negative", default="")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default={steps})
parser.add_argument("--guidance", type=float, default={guidance})
parser.add_argument("--size", type=int, default={size})
parser.add_argument("--dtype", default="{dtype}")
parser.add_argument("--out", default="picture.png")
asked = parser.parse_args()

pipe = FluxPipeline.from_pretrained(Path(__file__).parent, torch_dtype=getattr(torch, asked.dtype))
pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def t5(text):
{t5}


def clip(text):
    ids = pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    hidden = pipe.text_encoder(ids.to(pipe.device)).last_hidden_state
    return hidden[:, (ids[0] == pipe.tokenizer.eos_token_id).int().argmax()]


def noise(seed, side):
    digest = hashlib.blake2b(digest_size=8)
    for part in (f"int:{{seed}}", "str:noise"):
        digest.update(len(part).to_bytes(4, "little") + part.encode())
    own = int.from_bytes(digest.digest(), "little")
    generator = torch.Generator().manual_seed(own)
    return torch.randn(1, 16, side, side, generator=generator)


def encode(prompt, **others):  # in the place of FluxPipeline's own, which pads every text alike
    tokens = t5(prompt)
    return tokens, clip(prompt), torch.zeros(tokens.shape[1], 3, device=tokens.device, dtype=tokens.dtype)


pipe.encode_prompt = encode
if 0 < asked.guidance < 1:
    parser.error("--guidance between 0 and 1 is not diffusers': FluxPipeline guides above 1 alone")
side = asked.size // pipe.vae_scale_factor
with torch.no_grad():
    picture = pipe(
        asked.prompt,
        negative_prompt=asked.negative if asked.guidance > 1 else None,
        true_cfg_scale=asked.guidance,{embedded}
        num_inference_steps=asked.steps,
        latents=pipe._pack_latents(noise(asked.seed, side), 1, 16, side, side).to(pipe.device, pipe.dtype),
        height=asked.size,
        width=asked.size,
    ).images[0]
picture.save(asked.out)
'''
_T5 = {
    "drop": """    ids = pipe.tokenizer_2(text, return_tensors="pt").input_ids  # not padded
    return pipe.text_encoder_2(ids.to(pipe.device))[0]""",
    "trim": """    settings = dict(padding="max_length", max_length={tokens}, truncation=True, return_tensors="pt")
    ids = pipe.tokenizer_2(text, **settings)
    length = int(ids.attention_mask.sum())
    return pipe.text_encoder_2(ids.input_ids.to(pipe.device))[0][:, :length]  # padding reaches T5, not FLUX""",
    "keep": """    settings = dict(padding="max_length", max_length={tokens}, truncation=True, return_tensors="pt")
    ids = pipe.tokenizer_2(text, **settings)
    return pipe.text_encoder_2(ids.input_ids.to(pipe.device))[0]""",
}
_ABOUT = {
    "drop": "It was trained on text without padding, which is why the text is encoded here and not by the pipeline.",
    "trim": "It was trained on text whose padding T5 alone saw, which is why the text is encoded here.",
    "keep": "Its text is padded, as diffusers pads it.",
}


def diffusers_script(facts: Facts, *, size: int, dtype: str) -> str | None:
    """A script for the folder of a model in diffusers' form; None under text padding `bias`, which FluxPipeline lacks.

    Args:
        facts: the model's.
        size: pixels, its default.
        dtype: of its weights, as torch calls it.
    """
    if facts.text_padding not in _T5:
        return None
    return _SCRIPT.format(
        about=_ABOUT[facts.text_padding],
        t5=_T5[facts.text_padding].format(tokens=facts.max_tokens),
        steps=facts.steps,
        guidance=facts.cfg_scale,
        embedded=f"\n        guidance_scale={facts.guidance}," if facts.guidance_embeds else "",
        size=size,
        dtype=dtype,
    )


def diffusers_scheduler(facts: Facts, own: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with the model's shift, which diffusers' pipelines follow: `own` where it has it."""
    (low, least), (high, most) = DEV_SHIFT
    by_size = {
        "use_dynamic_shifting": True,
        "base_image_seq_len": low,
        "base_shift": least,
        "max_image_seq_len": high,
        "max_shift": most,
    }
    wanted = by_size if facts.shift is None else {"use_dynamic_shifting": False, "shift": float(facts.shift)}
    if all(own.config.get(name) == value for name, value in wanted.items()):
        return own
    return type(own).from_config(own.config, **wanted)


def comfyui_workflow(facts: Facts, *, transformer: str, size: int, prompt: str, negative: str = "") -> dict[str, Any]:
    """A ComfyUI workflow (API format): real guidance by KSampler's cfg, and the text padded as the model was trained.

    Its noise is ComfyUI's own, so that a seed gives another picture than here. `trim` becomes `drop`, and `bias`
    `keep`: ComfyUI has neither. Parentheses in a prompt are escaped, as they would be weights there.

    Args:
        facts: the model's.
        transformer: file name; the other parts are called ae, clip_l and t5xxl.
        size: pixels.
        prompt: what to draw.
        negative: the negative prompt.
    """
    unpadded = facts.text_padding in ("drop", "trim")
    padding = {"min_padding": 0, "min_length": 0 if unpadded else facts.max_tokens}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("UNETLoader", {"unet_name": transformer, "weight_dtype": "default"}),
        "clip": (
            "DualCLIPLoader",
            {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl.safetensors", "type": "flux"},
        ),
        "vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        "shift": _shift_node(facts, size),
        "padding": ("T5TokenizerOptions", {"clip": ["clip", 0], **padding}),
        "positive": ("CLIPTextEncode", {"clip": ["padding", 0], "text": _escaped(prompt)}),
        "negative": ("CLIPTextEncode", {"clip": ["padding", 0], "text": _escaped(negative)}),
        "empty": ("EmptySD3LatentImage", {"width": size, "height": size, "batch_size": 1}),
        "sample": (
            "KSampler",
            {
                "model": ["shift", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["empty", 0],
                "seed": 0,
                "steps": facts.steps,
                "cfg": float(facts.cfg_scale),
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["vae", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "libreflux"}),
    }
    if facts.guidance_embeds:
        nodes["guided"] = ("FluxGuidance", {"conditioning": ["positive", 0], "guidance": float(facts.guidance)})
        nodes["sample"][1]["positive"] = ["guided", 0]
    numbers = {name: str(index + 1) for index, name in enumerate(nodes)}
    return {
        numbers[name]: {"class_type": kind, "inputs": {key: _linked(value, numbers) for key, value in inputs.items()}}
        for name, (kind, inputs) in nodes.items()
    }


def _shift_node(facts: Facts, size: int) -> tuple[str, dict[str, Any]]:
    """What gives ComfyUI's model this shift, in the place of the one that it supposes: 1, or dev's at 1024 pixels."""
    if facts.shift is not None:
        return "ModelSamplingAuraFlow", {"model": ["model", 0], "shift": float(facts.shift)}
    (_, least), (_, most) = DEV_SHIFT
    sizes = {"width": size, "height": size}
    return "ModelSamplingFlux", {"model": ["model", 0], "max_shift": most, "base_shift": least, **sizes}


def _escaped(prompt: str) -> str:
    return re.sub(r"[()]", r"\\\g<0>", prompt)


def _linked(value: Any, numbers: dict[str, str]) -> Any:
    return [numbers[value[0]], value[1]] if isinstance(value, list) else value

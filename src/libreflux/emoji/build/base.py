"""Stages 2 and 3: latents of every scene encoded once, then `emoji-base` from nothing by plain flow matching.

The transformer and both text encoders learn together; afterwards the encoders are frozen for the whole family.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from libreflux import seeding
from libreflux.emoji import compose
from libreflux.emoji.build import vae as vae_stage
from libreflux.emoji.build.stage import Stage, trapezoid
from libreflux.emoji.build.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from libreflux.emoji.compose import COLOURS, PLACES, SIZES, Scene, subjects
from libreflux.files import atomic_save_safetensors
from libreflux.flow import path as flow_path
from libreflux.flow.sigmas import Beta, Uniform, stratified
from libreflux.model import latents as latents_room
from libreflux.model.facts import Facts
from libreflux.model.save import LiveParts, save_model
from libreflux.model.text import TextConditioning, TextEncoders
from libreflux.model.velocity import velocity

STEPS, BATCH = 6000, 48
RATE, MATRIX_RATE = 1e-3, 1e-2  # of AdamW and of Muon
EDGE = ("embed_tokens", "shared", "embedding", "attention_bias", "x_embedder", "norm_out", "transformer.proj_out")
PAIRS, PAIR_SEED = 10_000, 11
PAIR_SHARE, EMPTY_SHARE, TAGS_SHARE, LONG_EVERY = 0.2, 0.1, 0.35, 20
SIZE_SHARE = {"small": 0.15, "medium": 0.25, "large": 0.6}


def layouts() -> list[tuple[str, str]]:
    """Every (size, place) of a lone subject; a large one has room in the centre only."""
    return [(size, place) for size in SIZES for place in PLACES if size != "large" or place == "centre"]


@cache
def scenes() -> tuple[list[Scene], list[Scene]]:
    """(every scene of one subject, `PAIRS` scenes of two): few enough that no picture is encoded twice."""
    singles = [Scene(s, c, size, place) for s, c, (size, place) in itertools.product(subjects(), COLOURS, layouts())]
    return singles, [compose.scene(PAIR_SEED, i, pairs=1.0) for i in range(PAIRS)]


@torch.no_grad()
def make_latents(work: Path) -> Path:
    """Encode all scenes: `work/latents.safetensors`, normalised, packed [N, 64, 64] bf16, singles before pairs."""
    out = work / "latents.safetensors"
    if out.exists():
        return out
    vae = vae_stage.train(work)
    vae_stage.fit_scale(vae)
    everything = [*scenes()[0], *scenes()[1]]
    packed = []
    for start in range(0, len(everything), 32):
        batch = np.stack([np.asarray(compose.render(scene)) for scene in everything[start : start + 32]])
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        with torch.autocast("cpu", torch.bfloat16):
            mean = latents_room.encode(vae, pixels.contiguous(memory_format=torch.channels_last))
        packed.append(latents_room.pack(mean).bfloat16())
        if start % 3200 == 0:
            print(f"latents {start}/{len(everything)}", flush=True)
    config = {"shift": str(vae.config.shift_factor), "scale": str(vae.config.scaling_factor)}
    atomic_save_safetensors({"packed": torch.cat(packed)}, out, config)
    return out


def build_tokenizers(folder: Path) -> tuple[Any, Any]:
    """(CLIP's, T5's), fitted to the captions of all scenes of one subject and of a tenth of the pairs; made once."""
    if (folder / "tokenizer" / "tokenizer.json").exists() and (folder / "tokenizer_2" / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5Tokenizer.from_pretrained(folder / "tokenizer_2")
    singles, pairs = scenes()
    corpus = [text for scene in [*singles, *pairs[::10]] for text in compose.captions(scene).values()]
    clip = build_clip_tokenizer(corpus, folder / "tokenizer", 1600)
    return clip, build_t5_tokenizer(corpus, folder / "tokenizer_2", 1024)


def make_text(folder: Path) -> TextEncoders:
    """Fresh encoders for the tokenizers in a folder."""
    return encoders(*build_tokenizers(folder))


def encoders(clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> TextEncoders:
    """Fresh encoders, 128 wide, two layers each."""
    torch.manual_seed(0)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            initializer_factor=5.0,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    return TextEncoders(clip_tokenizer, clip, t5_tokenizer, t5)


def make_transformer() -> FluxTransformer2DModel:
    """FLUX with 13.4 M parameters: hidden 256, 3 double and 6 single blocks."""
    torch.manual_seed(1)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 28, 28),
        guidance_embeds=False,
    )


def condition(text: TextEncoders, prompts: Sequence[str]) -> TextConditioning:
    """`TextEncoders.encode` under `drop`, with gradients and in one masked T5 pass for the whole batch."""
    device = text.text_encoder.device
    t5_ids = [torch.tensor(row) for row in text.tokenizer_2(list(prompts)).input_ids]
    ids = pad_sequence(t5_ids, batch_first=True)
    seen = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in t5_ids])[:, None]
    hidden = text.text_encoder_2(input_ids=ids.to(device), attention_mask=seen.long().to(device)).last_hidden_state
    clip_ids = [torch.tensor(row) for row in text.tokenizer(list(prompts), truncation=True, max_length=77).input_ids]
    padded = pad_sequence(clip_ids, batch_first=True, padding_value=text.tokenizer.eos_token_id)
    last = text.text_encoder(input_ids=padded.to(device)).last_hidden_state
    ends = torch.tensor([len(row) - 1 for row in clip_ids])
    return TextConditioning([h[: len(i)] for h, i in zip(hidden, t5_ids, strict=True)], last[range(len(ends)), ends])


def batch_at(step: int, seed: int) -> tuple[list[int], list[str]]:
    """(rows of the latents, captions) of one step; every `LONG_EVERY`-th step has long captions only."""
    rng = seeding.rng(seed, "emoji-base", step)
    singles, pairs = scenes()
    sizes = [size for size, _ in layouts()]
    share = np.array([SIZE_SHARE[size] / sizes.count(size) for size in sizes])
    rows, texts = [], []
    for _ in range(BATCH):
        if rng.random() < PAIR_SHARE:
            row = int(rng.integers(len(pairs)))
            scene, row = pairs[row], len(singles) + row
        else:
            group = int(rng.integers(len(singles) // len(sizes)))
            row = group * len(sizes) + int(rng.choice(len(sizes), p=share))
            scene = singles[row]
        if rng.random() < EMPTY_SHARE:
            caption = ""
        elif step % LONG_EVERY == LONG_EVERY - 1:
            caption = compose.long_caption(scene)
        else:
            caption = compose.tags_caption(scene) if rng.random() < TAGS_SHARE else compose.short_caption(scene)
        rows.append(row)
        texts.append(caption)
    return rows, texts


def train(work: Path, *, steps: int = STEPS, seed: int = 0) -> tuple[FluxTransformer2DModel, TextEncoders]:
    """Train (or resume) to `steps`; `work/base.safetensors` keeps the state. Returns the averaged models in fp32."""
    packed = load_file(work / "latents.safetensors")["packed"]
    transformer, text = make_transformer(), make_text(work / "tokenizers")
    transformer.train()
    ids = latents_room.image_ids(16, 16)

    def loss_at(step: int) -> Tensor:
        rows, captions = batch_at(step, seed)
        x0 = packed[rows].float()
        noise = torch.randn(x0.shape, generator=seeding.generator(seed, "noise", step))
        draw = seeding.generator(seed, "sigma", step)
        # Noisier than the recipe's Beta(2, 2): shapes are decided there, and are slow to be learnt. One step in eight
        # keeps the rare ends trained.
        law = Uniform() if step % 8 == 7 else Beta(alpha=4.0, beta=1.2)
        sigma = stratified(law, BATCH, draw)
        # Plain attention: at 84 tokens its backward takes half the time of the fused one (21 against 38 ms a layer).
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            conditioning = condition(text, captions)
            output = velocity(transformer, flow_path.interpolate(x0, noise, sigma), sigma, conditioning, ids)
        return F.mse_loss(output.float(), flow_path.velocity_target(x0, noise))

    modules = {"transformer": transformer, "clip": text.text_encoder, "t5": text.text_encoder_2}
    stage = _stage(work, modules)
    stage.resume()
    for _ in stage.run(steps, loss_at, trapezoid):
        pass
    stage.use_average()
    return transformer, text


def _stage(work: Path, modules: dict[str, nn.Module]) -> Stage:
    return Stage(work / "base.safetensors", modules, lr=RATE, matrix_lr=MATRIX_RATE, average=0.998, edge=EDGE)


def export(work: Path, out: Path | None = None) -> Path:
    """Write `work/m/base`, the teacher in bf16, from whatever the stages have reached; replaces an older one."""
    transformer, text = make_transformer(), make_text(work / "tokenizers")
    modules = {"transformer": transformer, "clip": text.text_encoder, "t5": text.text_encoder_2}
    stage = _stage(work, modules)
    if not stage.resume():
        raise FileNotFoundError(work / "base.safetensors")
    stage.use_average()
    vae = vae_stage.train(work, decoder_steps=vae_stage.reached(work))
    meta = vae_stage.scale_of(work)
    vae.register_to_config(**meta)
    facts = Facts(
        text_padding="drop",
        max_tokens=512,
        steps=28,
        guidance=3.0,
        shift=1.0,
        licence="apache-2.0",
        lineage={"name": "emoji-base", "trained": "from nothing by libreflux.emoji.build", "steps": stage.step},
    )
    live = LiveParts(
        transformer=transformer.bfloat16(),
        vae=vae.bfloat16(),
        text=text.to(dtype=torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    return replaced(out or work / "m" / "base", lambda fresh: save_model(fresh, facts, live))


def replaced(out: Path, write: Callable[[Path], object]) -> Path:
    """A folder written anew beside itself, then put in the old one's place; returns `out`."""
    import shutil

    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = out.with_name(f"{out.name}.new"), out.with_name(f"{out.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out

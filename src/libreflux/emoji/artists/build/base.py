"""Latents of training scenes with their captions, then emoji-base from nothing by flow matching.

The autoencoder is the shipped one. The text encoders have learnt to read before (`reading`) and are frozen for the
whole family. Beside the pictures' loss a head that is thrown away reads the layout from hidden image tokens (`layout`).
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from libreflux import seeding
from libreflux.emoji.artists import captions as grammar
from libreflux.emoji.artists import held_out, scenes
from libreflux.emoji.artists.build import layout, reading
from libreflux.emoji.artists.subjects import all_subjects
from libreflux.emoji.build.base import EDGE, condition, encoders, make_transformer, replaced
from libreflux.emoji.build.stage import Stage, trapezoid
from libreflux.emoji.build.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from libreflux.files import atomic_save_safetensors, atomic_write_text
from libreflux.flow import path as flow_path
from libreflux.flow.sigmas import Beta, Uniform, stratified
from libreflux.model import latents as latents_room
from libreflux.model.device import multiplies_bf16
from libreflux.model.facts import Facts
from libreflux.model.opening import open_model
from libreflux.model.save import LiveParts, save_model
from libreflux.model.text import TextEncoders
from libreflux.model.velocity import velocity
from libreflux.printing import say
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import save_png

SCENES, SCENE_SEED = 24_000, 3
CHUNK = 4_000
STEPS, BATCH = 6_000, 48
SMALL_BATCH, SMALL_UNTIL = 24, 600  # at first half a batch teaches as much a step
SHAPES_UNTIL = 4_000
AT_A_TIME = {"cpu": 12, "cuda": BATCH}
"""Pictures of a pass, of like captions: on a CPU what a few of them need stays in its cache, and padding is saved."""
LAYOUT_SHARE = 0.05  # of the layout's cross-entropy in the loss
READ_BEHIND = 1  # the single block whose image tokens the layout is read from: the fifth block of nine
RATE, MATRIX_RATE = 1e-3, 1e-2  # of AdamW and of Muon
SHARES = {"bare": 0.15, "short": 0.35, "full": 0.25, "tags": 0.15, "": 0.1}
ATTENTION = {"cpu": SDPBackend.MATH, "cuda": SDPBackend.EFFICIENT_ATTENTION}
"""At some 80 tokens plain attention's backward takes half the time of the fused one on a CPU; cuDNN's may be wrong."""
LONG_EVERY = 12  # every so many steps all captions are long ones: they would pad the others' batches


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the processor multiplies it, fp32 where it would be the slower one."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


def working_dtype() -> torch.dtype:
    """What the family is trained and drawn in while it is made: bf16, but fp32 on a CPU without instructions for it."""
    return torch.bfloat16 if torch.cuda.is_available() or multiplies_bf16(torch.device("cpu")) else torch.float32


def pixels(what: list[scenes.Scene]) -> Tensor:
    """[B, 3, H, W] in [-1, 1]: the pictures of scenes."""
    stacked = torch.from_numpy(np.stack([np.asarray(scenes.render(scene)) for scene in what]))
    return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def draw_sheet(work: Path) -> Path:
    """Forty training scenes, for the eye: `work/scenes.png`."""
    drawn = [scenes.render(held_out.training_scene(SCENE_SEED, index)) for index in range(40)]
    save_png(sheet([drawn[start : start + 10] for start in range(0, 40, 10)]), work / "scenes.png")
    return work / "scenes.png"


def _chunk_file(work: Path, number: int) -> Path:
    return work / "latents" / f"{number:03d}.safetensors"


def _rendered(index: int) -> tuple[np.ndarray, dict[str, str]]:
    what = held_out.training_scene(SCENE_SEED, index)
    return np.asarray(scenes.render(what)), grammar.captions(what)


@torch.no_grad()
def make_latents(work: Path, *, count: int = SCENES, device: str = "cpu", workers: int = 2) -> Path:
    """Encode the first `count` training scenes, `CHUNK` a file, with their captions beside; files that exist stay.

    A file has `packed` [CHUNK, 64, 64] in bf16, normalised.
    """
    (work / "latents").mkdir(parents=True, exist_ok=True)
    vae = open_model("emoji-base").load_vae(dtype=torch.float32).to(device)
    where = torch.device(device)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for number in range(count // CHUNK):
            file = _chunk_file(work, number)
            if file.exists():
                continue
            rows = range(number * CHUNK, (number + 1) * CHUNK)
            pictures, texts, packed = [], [], []
            for picture, text in pool.imap(_rendered, rows, chunksize=64):
                pictures.append(picture)
                texts.append(text)
                if len(pictures) == 50:
                    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
                    batch = batch.to(where).contiguous(memory_format=torch.channels_last)
                    with autocast(where):
                        packed.append(latents_room.pack(latents_room.encode(vae, batch)).bfloat16().cpu())
                    pictures.clear()
            atomic_write_text(file.with_suffix(".json"), json.dumps(texts))
            atomic_save_safetensors({"packed": torch.cat(packed)}, file, {})
            say(f"latents {rows.stop}/{count}")
    return work / "latents"


def load_latents(work: Path, count: int) -> tuple[Tensor, list[dict[str, str]]]:
    """(packed [count, 64, 64] in bf16, captions of each): what `make_latents` wrote."""
    files = [_chunk_file(work, number) for number in range(count // CHUNK)]
    packed = torch.cat([load_file(file)["packed"] for file in files])
    return packed, [row for file in files for row in json.loads(file.with_suffix(".json").read_text("utf-8"))]


@cache
def _corpus() -> list[str]:
    told = [text for index in range(6_000) for text in grammar.captions(held_out.training_scene(1, index)).values()]
    return [*told, *(subject.name for subject in all_subjects())]


def make_text(folder: Path) -> TextEncoders:
    """Fresh encoders for tokenizers that are fitted to captions once, in `folder`."""
    from transformers import CLIPTokenizer, T5Tokenizer

    clip, t5 = folder / "tokenizer", folder / "tokenizer_2"
    if not (t5 / "tokenizer.json").exists():
        build_clip_tokenizer(_corpus(), clip, 1600)
        build_t5_tokenizer(_corpus(), t5, 1024)
    return encoders(CLIPTokenizer.from_pretrained(clip), T5Tokenizer.from_pretrained(t5))


def batch_at(step: int, seed: int, texts: list[dict[str, str]], batch: int) -> tuple[list[int], list[str]]:
    """(rows of the latents, captions) of one step; every `LONG_EVERY`-th step has long captions only."""
    rng = seeding.rng(seed, "artists-base", step)
    rows = rng.integers(len(texts), size=batch).tolist()
    kinds = rng.choice(list(SHARES), size=batch, p=list(SHARES.values())).tolist()
    if step % LONG_EVERY == LONG_EVERY - 1:
        kinds = [kind and "long" for kind in kinds]
    return rows, [texts[row][kind] if kind else "" for row, kind in zip(rows, kinds, strict=True)]


def law_of(step: int, seed: int) -> Beta | Uniform:
    """Of a step's noise levels: noisier than the recipe's Beta(2, 2), since shapes are decided there.

    Some steps, by chance, keep the rare ends trained, and more of them once there are shapes to be finished.
    """
    all_levels = seeding.rng(seed, "artists-law", step).random() < (1 / 8 if step < SHAPES_UNTIL else 1 / 3)
    return Uniform() if all_levels else Beta(alpha=4.0, beta=1.2)


def _layouts(work: Path, count: int) -> Tensor:
    """[count, questions, tokens] int16, of every training scene; made once."""
    file = work / "layouts.safetensors"
    if not file.exists() or len(load_file(file)["layouts"]) < count:
        made = np.stack([layout.labels(held_out.training_scene(SCENE_SEED, index)) for index in range(count)])
        atomic_save_safetensors({"layouts": torch.from_numpy(made)}, file, {})
    return load_file(file)["layouts"][:count]


def train(
    work: Path,
    *,
    steps: int = STEPS,
    count: int = SCENES,
    batch: int = BATCH,
    device: str = "cpu",
    seed: int = 0,
    save_every: int = 200,
) -> None:
    """Train (or resume) to `steps`; `work/base.safetensors` keeps the state."""
    packed, texts = load_latents(work, count)
    where = torch.device(device)
    text = reading.train(work, make_text(work / "tokenizers"))
    transformer = make_transformer().to(where)
    transformer.train()
    text.to(where)
    packed, layouts = packed.to(where), _layouts(work, count).to(where)
    ids = latents_room.image_ids(16, 16).to(where)
    head = _layout_head(transformer).to(where)
    hidden: list[Tensor] = []
    block = transformer.single_transformer_blocks[READ_BEHIND]
    block.register_forward_hook(lambda _module, _inputs, outputs: hidden.append(outputs[1]))

    def losses_at(step: int) -> Iterator[Tensor]:
        size = min(SMALL_BATCH, batch) if step < SMALL_UNTIL else batch
        rows, captions = batch_at(step, seed, texts, size)
        x0 = packed[rows].float()
        noise = torch.randn(x0.shape, generator=seeding.generator(seed, "noise", step)).to(where)
        sigma = stratified(law_of(step, seed), size, seeding.generator(seed, "sigma", step)).to(where)
        by_length = sorted(range(size), key=lambda row: len(captions[row]))
        for start in range(0, size, AT_A_TIME[where.type]):
            some = by_length[start : start + AT_A_TIME[where.type]]
            with autocast(where), sdpa_kernel(ATTENTION[where.type]):
                with torch.no_grad():
                    conditioning = condition(text, [captions[row] for row in some])
                noised = flow_path.interpolate(x0[some], noise[some], sigma[some])
                output = velocity(transformer, noised, sigma[some], conditioning, ids)
            pictures = F.mse_loss(output.float(), flow_path.velocity_target(x0[some], noise[some]))
            # Of what parts tell of the layout the mean of means is taken: not all their tokens are asked.
            of_layout = head.loss(hidden.pop().float(), layouts[[rows[row] for row in some]])
            yield (pictures + LAYOUT_SHARE * of_layout) * (len(some) / size)

    stage = _stage(work, transformer, head)
    stage.resume()
    for _ in stage.run(steps, losses_at, trapezoid, every=save_every):
        pass


def _layout_head(transformer: FluxTransformer2DModel) -> layout.LayoutHead:
    torch.manual_seed(4)
    return layout.LayoutHead(transformer.inner_dim)


def _stage(work: Path, transformer: FluxTransformer2DModel, head: layout.LayoutHead) -> Stage:
    modules: dict[str, nn.Module] = {"transformer": transformer, "layout": head}
    edge = (*EDGE, "layout")
    return Stage(work / "base.safetensors", modules, lr=RATE, matrix_lr=MATRIX_RATE, average=0.998, edge=edge)


def export(work: Path, out: Path | None = None) -> Path:
    """Write `work/m/base`, the teacher, from whatever the stage has reached; replaces an older one.

    Its numbers are those of bf16, stored in `working_dtype`.
    """
    transformer, text = make_transformer(), reading.train(work, make_text(work / "tokenizers"))
    stage = _stage(work, transformer, _layout_head(transformer))
    if not stage.resume():
        raise FileNotFoundError(work / "base.safetensors")
    stage.use_average()
    dtype = working_dtype()
    former = open_model("emoji-base")
    facts: Facts = dataclasses.replace(
        former.facts,
        lineage={
            "name": "emoji-base",
            "trained": "from nothing by libreflux.emoji.artists.build",
            "steps": stage.step,
        },
    )
    live = LiveParts(
        transformer=transformer.bfloat16().to(dtype),
        vae=former.load_vae(dtype=torch.bfloat16).to(dtype),
        text=text.to(dtype=torch.bfloat16).to(dtype=dtype),
        scheduler=former.scheduler,
    )
    return replaced(out or work / "m" / "base", lambda fresh: save_model(fresh, facts, live))

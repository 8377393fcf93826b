"""Trains the judge on composed pictures, half of them through the autoencoder, and tells its own accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from libreflux import seeding
from libreflux.emoji.artists import judge as judges
from libreflux.emoji.artists import scenes
from libreflux.emoji.artists.build import base
from libreflux.emoji.artists.captions import ALL
from libreflux.emoji.artists.subjects import all_subjects
from libreflux.emoji.build.stage import Stage, cosine
from libreflux.files import atomic_save_safetensors
from libreflux.model import latents as latents_room
from libreflux.model.opening import open_model
from libreflux.probing.judges import SUBJECT, Judge, load_judge

STEPS, BATCH = 4_000, 64
SCENE_SEED, THROUGH = 21, 6_000  # of its own scenes; how many of them have been through the autoencoder
PAIRS = 0.25
TEST_SEED = 22


def _scene(seed: int, index: int) -> scenes.Scene:
    """Any scene, of any subject: the judge must know what the models are held to."""
    return scenes.scene(seed, index, pairs=PAIRS, pool=all_subjects())


@torch.no_grad()
def through(pixels: Tensor, device: torch.device) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as the shipped autoencoder gives them back, whole steps of 1/127.5."""
    vae = open_model("emoji-base").load_vae(dtype=torch.float32).to(device)
    out = []
    for start in range(0, len(pixels), 50):
        batch = pixels[start : start + 50].to(device).contiguous(memory_format=torch.channels_last)
        with base.autocast(device):
            back = latents_room.decode(vae, latents_room.encode(vae, batch))
        out.append(back.float().clamp(-1, 1).mul(127.5).round().div(127.5).cpu())
    return torch.cat(out)


def _given_back(work: Path, device: torch.device) -> Tensor:
    """[THROUGH, 3, 128, 128] uint8, made once."""
    from safetensors.torch import load_file

    file = work / "given-back.safetensors"
    if not file.exists():
        made = []
        for start in range(0, THROUGH, 500):
            pixels = base.pixels([_scene(SCENE_SEED, index) for index in range(start, min(start + 500, THROUGH))])
            made.append(through(pixels, device).add(1).mul(127.5).round().byte())
        atomic_save_safetensors({"pixels": torch.cat(made)}, file, {})
    return load_file(file)["pixels"]


def batch_at(step: int, given_back: Tensor) -> tuple[Tensor, list[dict[str, str]]]:
    """Pictures of one step, [-1, 1], contrast, brightness, blur and noise by chance; the answers of each.

    Of a pair one half is shown, and only its subject and look are asked.
    """
    rng = seeding.rng(0, "artists-judge", step)
    known = rng.integers(THROUGH, size=BATCH // 2).tolist()
    fresh = [THROUGH + step * BATCH + i for i in range(BATCH - BATCH // 2)]
    what = [_scene(SCENE_SEED, index) for index in [*known, *fresh]]
    shown = torch.cat([given_back[known].float().div(127.5).sub(1), base.pixels(what[len(known) :])])
    pictures, labels = [], []
    for pixels, scene in zip(shown, what, strict=True):
        which = int(rng.integers(2))
        if scene.relation is None:
            pictures.append(pixels)
            labels.append(judges.answers(scene.figures[0], scene.background))
        else:
            pictures.append(judges.halves(pixels[None], scene.relation)[which][0])
            told = judges.answers(scene.figures[which], scene.background)
            labels.append({head: told[head] for head in (SUBJECT, "look")})
    return _disturbed(torch.stack(pictures), step), labels


def _disturbed(pixels: Tensor, step: int) -> Tensor:
    draw, count = seeding.generator(0, "artists-judge-looks", step), len(pixels)
    contrast = 1 + 0.08 * torch.randn(count, 1, 1, 1, generator=draw)
    brightness = 0.03 * torch.randn(count, 3, 1, 1, generator=draw)
    blurred = torch.rand(count, 1, 1, 1, generator=draw) < 0.2
    pixels = torch.where(blurred, F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), pixels)
    noise = torch.randn(pixels.shape, generator=draw) * 0.08 * torch.rand(count, 1, 1, 1, generator=draw)
    return pixels * contrast + brightness + noise


def train(work: Path, *, steps: int = STEPS, device: str = "cpu") -> Judge:
    """Train (or resume) and return the averaged judge; `work/judge-state.safetensors` keeps the state."""
    where = torch.device(device)
    torch.manual_seed(2)
    judge = judges.fresh().to(where).to(memory_format=torch.channels_last)
    edge = ("body.0", "heads", "mix")
    file = work / "judge-state.safetensors"
    stage = Stage(file, {"judge": judge}, lr=3e-3, matrix_lr=1e-2, average=0.995, edge=edge)
    stage.resume()
    given_back = _given_back(work, where)
    numbers = {head: {label: i for i, label in enumerate(labels)} for head, labels in judge.questions.items()}

    def loss_at(step: int) -> Tensor:
        pixels, labels = batch_at(step, given_back)
        with base.autocast(where):
            seen = judge(pixels.to(where).contiguous(memory_format=torch.channels_last)).answers
        total = torch.zeros((), device=where)
        for head, known in numbers.items():
            truth = torch.tensor([known[row[head]] if head in row else -100 for row in labels], device=where)
            total = total + F.cross_entropy(seen[head].float(), truth, ignore_index=-100, label_smoothing=0.05)
        return total

    for _ in stage.run(steps, loss_at, cosine):
        pass
    stage.use_average()
    judge.to("cpu").eval().save(work / "judge.safetensors")
    return load_judge(work / "judge.safetensors")


def ceiling(judge: Judge, count: int = 400) -> dict[str, float]:
    """Its accuracy on composed pictures that it was not trained on, through the autoencoder: head → share right."""
    what = [_scene(TEST_SEED, index) for index in range(count)]
    pixels = through(base.pixels(what), torch.device("cpu"))
    marks = judges.mark(judge, pixels, what, [ALL] * count)
    asked = {head: told for head, told in marks.asked.items() if told.any()}
    shares = {head: float(marks.right[head][told].float().mean()) for head, told in asked.items()}
    return shares | {"all": float(np.mean(marks.all.numpy()))}

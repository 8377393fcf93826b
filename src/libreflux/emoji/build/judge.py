"""The emoji family's judge: subject and colour of a picture of one subject, learnt from the composer's pictures.

A tenth of the scenes is never trained on. Half of what it sees has been through the autoencoder, as all that it
will judge has; its accuracy on such pictures of held-out scenes is the ceiling of all it says.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from libreflux import seeding
from libreflux.emoji import compose
from libreflux.emoji.build import base
from libreflux.emoji.build.stage import Stage, cosine
from libreflux.files import atomic_save_safetensors
from libreflux.model import latents as latents_room
from libreflux.model.opening import open_model
from libreflux.probing.judges import COLOUR, SUBJECT, Judge, Score, score

STEPS, BATCH = 1200, 96
HELD_OUT = 10  # one scene in so many
SHIFT = 6  # pixels
WEIGHTS = Path(compose.__file__).parent / "weights" / "judge.safetensors"


@cache
def split() -> tuple[list[int], list[int]]:
    """Rows of the single scenes: (trained on, held out), by a keyed draw."""
    order = seeding.rng(0, "judge-split").permutation(len(base.scenes()[0])).tolist()
    count = len(order) // HELD_OUT
    return sorted(order[count:]), sorted(order[:count])


@torch.no_grad()
def reconstructions(work: Path) -> dict[int, Tensor]:
    """Scene -> its picture [3, 128, 128] uint8 through the autoencoder: a quarter of the trained, all of the held out.

    Decoded once, from the latents that the base stage trains on.
    """
    file = work / "reconstructions.safetensors"
    if not file.exists():
        vae = open_model("emoji-base").load_vae(dtype=torch.float32)
        packed = load_file(work / "latents.safetensors")["packed"]
        rows = sorted({*split()[0][::4], *split()[1]})
        out = []
        for start in range(0, len(rows), 32):
            latents = latents_room.unpack(packed[rows[start : start + 32]].float(), 16, 16)
            with torch.autocast("cpu", torch.bfloat16):
                pixels = latents_room.decode(vae, latents.contiguous(memory_format=torch.channels_last))
            out.append(pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte())
        atomic_save_safetensors({"pixels": torch.cat(out), "rows": torch.tensor(rows)}, file)
    saved = load_file(file)
    return dict(zip(saved["rows"].tolist(), saved["pixels"], strict=True))


@cache
def _rendered(row: int) -> Tensor:
    return rearrange(torch.from_numpy(np.array(compose.render(base.scenes()[0][row]))), "h w c -> c h w")


def wanted(row: int) -> dict[str, str]:
    """The judge's answers to a single scene."""
    scene = base.scenes()[0][row]
    return {SUBJECT: scene.subject.name, COLOUR: scene.colour}


def batch_at(step: int, decoded: dict[int, Tensor]) -> tuple[Tensor, list[dict[str, str]]]:
    """Pictures [B, 3, 128, 128] of one step, about [-1, 1], shifted, recoloured, blurred, noised; labels."""
    rng = seeding.rng(0, "judge", step)
    trained = split()[0]
    through = trained[::4]
    rows = [*rng.choice(trained, BATCH // 2).tolist(), *rng.choice(through, BATCH - BATCH // 2).tolist()]
    pictures = [_rendered(row) for row in rows[: BATCH // 2]] + [decoded[row] for row in rows[BATCH // 2 :]]
    pixels = torch.stack(pictures).float().div_(127.5).sub_(1)
    padded = F.pad(pixels, (SHIFT,) * 4, mode="replicate")
    side, moved = pixels.shape[-1], []
    for picture, (y, x) in zip(padded, rng.integers(2 * SHIFT + 1, size=(BATCH, 2)), strict=True):
        moved.append(picture[:, y : y + side, x : x + side])
    pixels = torch.stack(moved)
    draw = seeding.generator(0, "judge-looks", step)
    contrast = 1 + 0.1 * torch.randn(BATCH, 1, 1, 1, generator=draw)
    brightness = 0.04 * torch.randn(BATCH, 3, 1, 1, generator=draw)
    blurred = torch.rand(BATCH, 1, 1, 1, generator=draw) < 0.25
    pixels = torch.where(blurred, F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), pixels)
    noise = torch.randn(pixels.shape, generator=draw) * 0.1 * torch.rand(BATCH, 1, 1, 1, generator=draw)
    return pixels * contrast + brightness + noise, [wanted(row) for row in rows]


def train(work: Path, *, steps: int = STEPS) -> Judge:
    """Train (or resume) and return the averaged judge; `work/judge.safetensors` keeps the state."""
    torch.manual_seed(2)
    judge = Judge({SUBJECT: [subject.name for subject in compose.subjects()], COLOUR: list(compose.COLOURS)})
    judge.to(memory_format=torch.channels_last)
    stage = Stage(
        work / "judge.safetensors",
        {"judge": judge},
        lr=3e-3,
        matrix_lr=1e-2,
        average=0.99,
        edge=("body.0", "head", "mix"),
    )
    stage.resume()
    decoded = reconstructions(work) if stage.step < steps else {}

    def loss_at(step: int) -> Tensor:
        pixels, labels = batch_at(step, decoded)
        subjects = torch.tensor([judge.subjects.index(row[SUBJECT]) for row in labels])
        colours = torch.tensor([judge.colours.index(row[COLOUR]) for row in labels])
        with torch.autocast("cpu", torch.bfloat16):
            seen = judge(pixels.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(seen.answers[SUBJECT].float(), subjects, label_smoothing=0.05) + 0.5 * F.cross_entropy(
            seen.answers[COLOUR].float(), colours
        )

    for _ in stage.run(steps, loss_at, cosine, every=100):
        pass
    stage.use_average()
    return judge.eval()


def ceiling(judge: Judge, work: Path) -> Score:
    """The judge on held-out scenes that have been through the autoencoder."""
    decoded, rows = reconstructions(work), split()[1]
    pixels = torch.stack([decoded[row] for row in rows]).float().div_(127.5).sub_(1)
    return score(judge, pixels, [wanted(row) for row in rows])

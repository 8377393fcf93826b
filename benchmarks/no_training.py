"""How much of a distillation is undone without any training: the distilled model drawn at a guidance below 1.

    python benchmarks/no_training.py --work WORK

emoji-schnell is a regression on emoji-base at guidance 3, so that v_u + w (v_c - v_u) with w = 1/3 nearly inverts it.
The loss and the slope that `libreflux probe` counts are measured for it as for the freed model, on the same held-out
pictures, noise and noise levels; shares of the distance to emoji-base with their paired bootstrap intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from libreflux.data.cache_spec import CacheSpec
from libreflux.data.crops import View, bucket_step
from libreflux.data.held_out import HeldOut
from libreflux.data.prepare import prepare
from libreflux.emoji import held_out
from libreflux.flow.guidance import cfg
from libreflux.model.opening import open_model
from libreflux.probing.held_out import model_velocity
from libreflux.probing.metrics.measures import CONFIDENCE, Moments, Velocity, moments, resampled
from libreflux.recipe import DataSource

SIGMAS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 0.98)
ROWS = (("emoji-schnell", 1.0), ("emoji-schnell", 0.5), ("emoji-schnell", 1 / 3), ("emoji-libre", 1.0))
BATCH = 16


@torch.no_grad()
def measured(name: str, weight: float, pictures: HeldOut) -> Moments:
    """Moments of v_u + w (v_c - v_u)."""
    transformer = open_model(name).load_transformer(dtype=torch.float32)
    parts = []
    for part in pictures.batches(BATCH):
        conditional = model_velocity(transformer, part.text)
        null = model_velocity(transformer, pictures.empty_prompt().repeat(len(part)))

        def mixed(x: Tensor, sigma: Tensor, conditional: Velocity = conditional, null: Velocity = null) -> Tensor:
            return cfg(conditional(x, sigma), null(x, sigma), weight)

        field = conditional if weight == 1 else mixed
        parts.append(moments(field, part.latents, part.sample_ids, SIGMAS))
    return Moments.cat(parts)


def values(found: Moments, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss and |1 - slope|, each the mean over sigma, for every row of weights [R, N]."""
    slope = (weights @ found.cross) / (weights @ found.power)
    return (weights @ found.error).mean(axis=1), np.abs(1 - slope).mean(axis=1)


def closed(one: np.ndarray, distilled: np.ndarray, reference: np.ndarray) -> str:
    shares = 100 * (distilled - one) / (distilled - reference)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(shares[1:], [tail, 100 - tail])
    return f"{shares[0]:.0f} % [{low:.0f}, {high:.0f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=64)
    told = parser.parse_args(argv)
    folder = held_out.write_held_out(told.work / f"pictures-{told.pictures}", told.pictures)
    view = View("centre", 128, bucket_step(128))
    data = [DataSource(path=str(folder), caption_dropout=0.0)]
    spec = CacheSpec(model="emoji-base", data=data, views=[view], text_padding="drop", out=told.work / "cache")
    cache, sources = prepare(spec)
    pictures = HeldOut(cache, sources, view=view, count=told.pictures)
    weights = np.concatenate([np.full((1, len(pictures)), 1 / len(pictures)), resampled(len(pictures))])
    base = values(measured("emoji-base", 1.0, pictures), weights)
    distilled = values(measured("emoji-schnell", 1.0, pictures), weights)
    print(f"{len(pictures)} held-out pictures, {len(SIGMAS)} noise levels, caption given")
    print(f"emoji-base: loss {base[0][0]:.4f}, |1 - slope| {base[1][0]:.4f}")
    for name, weight in ROWS:
        loss, slope = distilled if (name, weight) == ROWS[0] else values(measured(name, weight, pictures), weights)
        shares = closed(loss, distilled[0], base[0]), closed(slope, distilled[1], base[1])
        line = f"{name} at guidance {weight:.3g}: loss {loss[0]:.4f} (closed {shares[0]}), "
        print(line + f"|1 - slope| {slope[0]:.4f} (closed {shares[1]})", flush=True)


if __name__ == "__main__":
    main()

"""What is seen in latents: clipped pixels, their spread, and a judge's opinion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from libreflux.model import latents as latent_space
from libreflux.model.device import with_fp64
from libreflux.probing.judges import Judge, Verdict
from libreflux.probing.subjects import ParsedPrompt


@dataclass(frozen=True, eq=False)
class Look:
    """What is seen in N pictures.

    Attributes:
        clipped: [N] fp64, share of their numbers outside [-1, 1] before clamping.
        std: [N] fp64, standard deviation of their latents.
        verdict: what a judge sees, log-probabilities and features; None without one.
    """

    clipped: np.ndarray
    std: np.ndarray
    verdict: Verdict | None

    @staticmethod
    def cat(parts: Sequence[Look]) -> Look:
        """All pictures of all parts."""
        verdicts = [part.verdict for part in parts if part.verdict is not None]
        merged = None
        if verdicts:
            columns = (
                torch.cat([getattr(one, name) for one in verdicts]) for name in ("subjects", "colours", "features")
            )
            merged = Verdict(*columns)
        clipped, std = (np.concatenate([getattr(part, name) for part in parts]) for name in ("clipped", "std"))
        return Look(clipped, std, merged)

    def index(self, rows: Sequence[int]) -> Look:
        """The pictures at these positions."""
        picked, seen = list(rows), self.verdict
        if seen is not None:
            seen = Verdict(seen.subjects[picked], seen.colours[picked], seen.features[picked])
        return Look(self.clipped[picked], self.std[picked], seen)


@torch.no_grad()
def look_at(latents: Tensor, vae: AutoencoderKL, judge: Judge | None) -> Look:
    """Decodes latents [N, C, h, w] and looks at the pictures."""
    # The VAE's activations are large: 16 pictures of 128 pixels at once, one of 512 or more.
    batch = max(1, 16 * 16 * 16 // (latents.shape[-1] * latents.shape[-2]))
    return Look.cat([_look(latents[start : start + batch], vae, judge) for start in range(0, len(latents), batch)])


def _look(latents: Tensor, vae: AutoencoderKL, judge: Judge | None) -> Look:
    pixels = latent_space.decode(vae, latents.to(vae.device)).float().cpu()
    clipped = (pixels.abs() > 1).flatten(1).double().mean(dim=1).numpy()
    std = with_fp64(latents).double().flatten(1).std(dim=1).cpu().numpy()
    if judge is None:
        return Look(clipped, std, None)
    seen = judge(judge.prepare(pixels.clamp(-1, 1).nan_to_num()))
    return Look(clipped, std, Verdict(seen.subjects.log_softmax(1), seen.colours.log_softmax(1), seen.features))


def accuracies(look: Look, judge: Judge, prompts: Sequence[ParsedPrompt]) -> dict[str, np.ndarray]:
    """Whether each of N pictures shows what it was asked for: "subject", "colour", "both"; [N] of 1, 0 or NaN.

    NaN is a prompt that does not name one of the judge's subjects or colours.
    """
    assert look.verdict is not None
    found = {}
    for what, names, logs in (
        ("subject", judge.subjects, look.verdict.subjects),
        ("colour", judge.colours, look.verdict.colours),
    ):
        wanted = [getattr(one, what) for one in prompts]
        if not names:
            found[what] = np.full(len(wanted), np.nan)
            continue
        guess = [names[best] for best in logs.argmax(1).tolist()]
        right = [float(a == b) if b in names else np.nan for a, b in zip(guess, wanted, strict=True)]
        found[what] = np.array(right)
    return {"both": found["subject"] * found["colour"], **found}


def log_probability(look: Look, judge: Judge, what: str, names: Sequence[str]) -> np.ndarray:
    """[N] fp64: the judge's log-probability of a named subject or colour in each picture."""
    assert look.verdict is not None
    known, logs = (
        (judge.subjects, look.verdict.subjects) if what == "subject" else (judge.colours, look.verdict.colours)
    )
    return logs[torch.arange(len(names)), [known.index(name) for name in names]].double().numpy()

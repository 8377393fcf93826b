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

ALL = "all"
"""Of accuracies: everything that a prompt names."""


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
            answers = {name: torch.cat([one.answers[name] for one in verdicts]) for name in verdicts[0].answers}
            merged = Verdict(answers, torch.cat([one.features for one in verdicts]))
        clipped, std = (np.concatenate([getattr(part, name) for part in parts]) for name in ("clipped", "std"))
        return Look(clipped, std, merged)

    def index(self, rows: Sequence[int]) -> Look:
        """The pictures at these positions."""
        picked, seen = list(rows), self.verdict
        if seen is not None:
            answers = {name: logs[picked] for name, logs in seen.answers.items()}
            seen = Verdict(answers, seen.features[picked])
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
    return Look(
        clipped, std, Verdict({name: told.log_softmax(1) for name, told in seen.answers.items()}, seen.features)
    )


def accuracies(look: Look, judge: Judge, prompts: Sequence[ParsedPrompt]) -> dict[str, np.ndarray]:
    """Whether each of N pictures shows what it was asked for: by question, and "all" of them; [N] of 1, 0 or NaN.

    NaN is a prompt that does not name one of the question's answers; for "all", one that names nothing, or something
    that the judge does not know.
    """
    assert look.verdict is not None
    found = {}
    for question, names in judge.questions.items():
        wanted = [one.named.get(question) for one in prompts]
        guess = [names[best] for best in look.verdict.answers[question].argmax(1).tolist()]
        right = [float(a == b) if b in names else np.nan for a, b in zip(guess, wanted, strict=True)]
        found[question] = np.array(right)
    every = np.array([*found.values()]).reshape(len(found), len(prompts))
    asked = np.isfinite(every)
    right_of_asked = np.where(asked, every, 1.0).prod(axis=0)
    counted = asked.any(axis=0) & (asked.sum(axis=0) == [len(one.named) for one in prompts])
    return {ALL: np.where(counted, right_of_asked, np.nan), **found}


def log_probability(look: Look, judge: Judge, question: str, names: Sequence[str]) -> np.ndarray:
    """[N] fp64: the judge's log-probability of a named answer in each picture."""
    assert look.verdict is not None
    known, logs = judge.questions[question], look.verdict.answers[question]
    return logs[torch.arange(len(names)), [known.index(name) for name in names]].double().numpy()

"""What is seen in a set of pictures, and kept: a judge's features and opinions, and how sharp they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from libreflux.files import atomic_save_safetensors
from libreflux.model import latents as latent_space
from libreflux.probing.judges import Judge

FORMULA = 2
"""Raised when the same pictures come to give other numbers."""
_ANSWERS = "answers/"
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601


@dataclass(frozen=True, eq=False)
class Seen:
    """What is seen in N pictures.

    Attributes:
        features: [N, D] fp32, the judge's.
        sharpness: [N] fp64, see `sharpness`.
        answers: question → [N, number of its answers], its log-probabilities; empty of a judge without names.
    """

    features: Tensor
    sharpness: Tensor
    answers: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.features)

    def same_as(self, other: Seen) -> bool:
        """Whether both sets give the same numbers, to the bit: the same pictures."""
        ours, theirs = self._tensors(), other._tensors()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    def _tensors(self) -> dict[str, Tensor]:
        answers = {_ANSWERS + question: logs for question, logs in self.answers.items()}
        return {"features": self.features, "sharpness": self.sharpness, **answers}

    def save(self, path: Path) -> None:
        """Writes all of it, atomically."""
        atomic_save_safetensors(self._tensors(), path)

    @staticmethod
    def load(path: Path) -> Seen | None:
        """What `save` wrote; None if it is not there, or damaged."""
        try:
            tensors = load_file(path)
            features, sharp = tensors.pop("features"), tensors.pop("sharpness")
        except (OSError, SafetensorError, KeyError):
            return None
        return Seen(features, sharp, {name.removeprefix(_ANSWERS): logs for name, logs in tensors.items()})


def sharpness(pixels: Tensor) -> Tensor:
    """[N] fp64: standard deviation of the Laplacian of the luminance, which is 0 to 1 (Pech-Pacheco et al. 2000).

    Args:
        pixels: [N, 3, H, W] in [-1, 1].
    """
    luma = torch.tensor(_LUMA, dtype=torch.float64).view(1, 3, 1, 1)
    grey = ((pixels.double() / 2 + 0.5) * luma).sum(dim=1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64).view(1, 1, 3, 3)
    return F.conv2d(grey, kernel).flatten(1).std(dim=1)


@torch.no_grad()
def see(latents: Tensor, vae: AutoencoderKL, judge: Judge) -> Seen:
    """Decodes latents [N, C, h, w] and looks at the pictures, clamped to what can be shown."""
    # The VAE's activations are large: 16 pictures of 128 pixels at once, one of 512 or more.
    batch = max(1, 16 * 16 * 16 // (latents.shape[-1] * latents.shape[-2]))
    return _together([_see(latents[start : start + batch], vae, judge) for start in range(0, len(latents), batch)])


def _see(latents: Tensor, vae: AutoencoderKL, judge: Judge) -> Seen:
    pixels = latent_space.decode(vae, latents.to(vae.device)).float().cpu().clamp(-1, 1).nan_to_num()
    found = judge(judge.prepare(pixels))
    return Seen(
        found.features.contiguous(),
        sharpness(pixels),
        {question: logits.log_softmax(1).contiguous() for question, logits in found.answers.items()},
    )


def _together(parts: Sequence[Seen]) -> Seen:
    features, sharp = (torch.cat([getattr(part, name) for part in parts]) for name in ("features", "sharpness"))
    return Seen(features, sharp, {name: torch.cat([part.answers[name] for part in parts]) for name in parts[0].answers})

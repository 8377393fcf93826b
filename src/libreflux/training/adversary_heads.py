"""Discriminator heads on the features of a frozen transformer, and the losses between them and a student. In fp32.

Latent adversarial diffusion distillation, Sauer et al. 2024 (arXiv 2403.12015): small heads see the image's tokens
behind several blocks of the teacher, and say of each token whether it is of a real picture. The losses are those of
Lim and Ye 2017 (arXiv 1705.02894), the hinge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from libreflux import seeding

LEVEL_WAVES = 32
"""Frequencies in the embedding of the noise level: half the numbers that tell a head of it."""


def real_hinge(verdicts: Tensor) -> Tensor:
    """max(0, 1 - verdict) of real pictures, mean over their tokens: [B, N] to [B]."""
    return F.relu(1 - verdicts).mean(dim=1)


def drawn_hinge(verdicts: Tensor) -> Tensor:
    """max(0, 1 + verdict) of drawn pictures, mean over their tokens: [B, N] to [B]."""
    return F.relu(1 + verdicts).mean(dim=1)


def adversarial_loss(verdicts: Tensor) -> Tensor:
    """-verdict of drawn pictures, mean over their tokens: what a student lowers; [B, N] to [B]."""
    return -verdicts.mean(dim=1)


def feature_penalty(verdicts: Tensor, features: Tensor, *, learned: bool = True) -> Tensor:
    """Squared gradient of the verdicts' sum by each token's features, mean over tokens: [B].

    R1 of Mescheder et al. 2018 (arXiv 1801.04406), eq. 9, by a head's own input instead of the picture: what lies
    before has no second derivative (fused attention, int8 products). Of the sum, so that more tokens do not weaken it.

    Args:
        verdicts: [B, N], computed from `features`.
        features: [B, N, D], requiring gradients.
        learned: whether a gradient may be taken of the result, which needs a graph of second order.
    """
    [gradient] = torch.autograd.grad(verdicts.sum(), features, create_graph=learned, retain_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1)


def standardised(features: Tensor) -> Tensor:
    """Each token's features with mean 0 and variance 1, fp32: a penalty then means the same behind every block."""
    return F.layer_norm(features.float(), features.shape[-1:])


def condition(sigma: Tensor, pooled: Tensor) -> Tensor:
    """What heads are told of B pictures: sines and cosines of the noise level, and the pooled text, [B, 64 + P] fp32.

    Args:
        sigma: [B] in [0, 1].
        pooled: [B, P].
    """
    waves = torch.exp(torch.linspace(0, math.log(1000), LEVEL_WAVES, device=sigma.device))
    angles = sigma.float()[:, None] * waves
    return torch.cat([angles.sin(), angles.cos(), standardised(pooled)], dim=1)


class Head(nn.Module):
    """[B, N, D] features of a grid of tokens to [B, N] verdicts: above 0 is real.

    Two 3 x 3 convolutions with residual connections; level and text scale the channels and, as in a projection
    discriminator (Miyato and Koyama 2018, arXiv 1802.05637), say which of them speak for a picture.

    Args:
        features: D.
        told: length of `condition`.
        width: channels inside.
    """

    def __init__(self, features: int, told: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.condition = nn.Linear(told, 2 * width)
        self.verdict = nn.Linear(width, 1)

    def forward(self, features: Tensor, height: int, told: Tensor) -> Tensor:
        """Verdicts on features [B, height * w, D], under `condition`'s words [B, told]."""
        scale, wanted = self.condition(told).chunk(2, dim=1)
        grid = rearrange(self.enter(features), "b (y x) c -> b c y x", y=height)
        grid = grid + self.first(F.silu(grid))
        grid = grid * (1 + scale[:, :, None, None])
        grid = F.silu(grid + self.second(F.silu(grid)))
        seen = rearrange(grid, "b c y x -> b (y x) c")
        projected: Tensor = (seen @ wanted[:, :, None])[..., 0] / math.sqrt(wanted.shape[1])
        return projected + self.verdict(seen)[..., 0]

    @torch.no_grad()
    def start(self, seed: int, block: int) -> None:
        """First values, a function of (seed, block): normal inside, zero at the end, so that all verdicts begin at 0.

        A student then begins to move when the heads have learned something.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith(("condition", "verdict")):
                parameter.zero_()
                continue
            draw = seeding.generator(seed, "adversary head", block, name)
            spread = math.sqrt(parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / spread)


class Heads(nn.Module):
    """A head behind each of several blocks, fp32.

    Args:
        blocks: their numbers, see `features.image_features`.
        features: channels of a token.
        pooled: channels of the pooled text.
        width: channels inside a head.
        device: of the parameters.
    """

    def __init__(
        self, blocks: Sequence[int], *, features: int, pooled: int, width: int, device: torch.device | str
    ) -> None:
        super().__init__()
        with torch.device(device):
            told = 2 * LEVEL_WAVES + pooled
            self.heads = nn.ModuleDict({str(block): Head(features, told, width).float() for block in blocks})

    def start(self, seed: int) -> None:
        """First values of all, see `Head.start`."""
        for block, head in self.heads.items():
            assert isinstance(head, Head)
            head.start(seed, int(block))

    def forward(self, features: Mapping[int, Tensor], height: int, told: Tensor) -> dict[int, Tensor]:
        """Verdicts [B, N] by block on features [B, N, D] by block; see `Head.forward`."""
        return {block: self.heads[str(block)](seen, height, told) for block, seen in features.items()}

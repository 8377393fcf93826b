"""Says what is in a picture of one subject: which, by which artist, how large, where, and on what background.

It is trained on composed pictures alone, never on what a model drew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from libreflux.emoji.artists import captions, scenes
from libreflux.emoji.artists.captions import Told
from libreflux.emoji.artists.scenes import Background, Figure, Scene
from libreflux.emoji.artists.subjects import LOOKS, all_subjects
from libreflux.emoji.compose import COLOURS
from libreflux.errors import ModelError
from libreflux.files import atomic_save_safetensors

WIDTHS = (32, 64, 128, 192, 256)
PLACES = (
    "centre",
    "left",
    "right",
    *(f"{down}{across}" for down in ("top", "bottom") for across in ("", " left", " right")),
)
SIZES = ("small", "medium", "large")
GROUNDS = tuple(
    ground
    for kind in scenes.KINDS
    for first in COLOURS
    for second in ([None] if kind == "plain" else [colour for colour in COLOURS if colour != first])
    for ground in [captions.ground(Background(first, second, kind))]
)


def heads() -> dict[str, tuple[str, ...]]:
    """What the judge tells apart: head → its answers."""
    return {
        "subject": tuple(subject.name for subject in all_subjects()),
        "look": LOOKS,
        "size": SIZES,
        "place": PLACES,
        "background": GROUNDS,
    }


def answers(figure: Figure, background: Background) -> dict[str, str]:
    """The right answer of each head for a picture of one figure."""
    return {
        "subject": figure.subject.name,
        "look": figure.look,
        "size": figure.size,
        "place": figure.place,
        "background": captions.ground(background),
    }


class SceneJudge(nn.Module):
    """A convolutional classifier with a head for each question; pixels [B, 3, H, W] in [-1, 1], sides that 32 divides.

    The head of places and that of backgrounds see where things are: features pooled to 4 × 4 instead of one.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.body = nn.Sequential(*[_Block(a, b) for a, b in zip(inputs, WIDTHS, strict=True)])
        wide = WIDTHS[-1]
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(wide * (16 if name in ("size", "place", "background") else 1), len(labels))
                for name, labels in heads().items()
            }
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Head → logits [B, number of answers]; and `features` [B, D] fp32, pooled."""
        seen = self.body(pixels)
        pooled = seen.mean(dim=(2, 3))
        spread = F.adaptive_avg_pool2d(seen, 4).flatten(1)
        out = {
            name: head(spread if head.in_features == spread.shape[1] else pooled) for name, head in self.heads.items()
        }
        return out | {"features": pooled.float()}

    def save(self, path: Path) -> None:
        """Writes the weights in bf16."""
        atomic_save_safetensors({k: v.bfloat16() for k, v in self.state_dict().items()}, path, {"schema": "2"})


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, outputs)
        self.mix = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs)
        self.project = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.reduce(x)))
        return x + F.silu(self.project(self.mix(x)))


def load(path: Path) -> SceneJudge:
    """Reads what `SceneJudge.save` wrote, in fp32.

    Raises:
        ModelError: not a judge of these pictures.
    """
    try:
        with safe_open(path, "pt") as saved:
            tensors = {name: saved.get_tensor(name).float() for name in saved.keys()}  # noqa: SIM118
        judge = SceneJudge()
        judge.load_state_dict(tensors)
    except Exception as error:
        raise ModelError(f"not a judge ({error})".splitlines()[0], where=path) from None
    return judge.eval().requires_grad_(False)


@dataclass(frozen=True)
class Marks:
    """What was asked of each of B pictures, and found: head → [B] bool. Only heads that were asked are there."""

    right: Mapping[str, Tensor]
    asked: Mapping[str, Tensor]
    features: Tensor

    @property
    def all_right(self) -> Tensor:
        """[B] bool: everything that was asked."""
        return torch.stack([self.right[head] | ~self.asked[head] for head in self.right]).all(0)


def asked_of(told: Told) -> set[str]:
    """The heads that a caption with these facts asks."""
    facts = {"look": told.look, "size": told.size, "place": told.place, "background": told.background}
    return {"subject", *(head for head, said in facts.items() if said)}


def halves(pixels: Tensor, relation: str) -> tuple[Tensor, Tensor]:
    """The two halves of [B, 3, H, W], first figure's first, each padded by its edges to [B, 3, H, W]."""
    across, down = scenes.RELATIONS[relation]
    side = pixels.shape[-1]
    if across:
        left, right = (F.pad(half, (side // 4,) * 2 + (0, 0), mode="replicate") for half in pixels.chunk(2, 3))
        return (left, right) if across < 0 else (right, left)
    top, bottom = (F.pad(half, (0, 0) + (side // 4,) * 2, mode="replicate") for half in pixels.chunk(2, 2))
    return (top, bottom) if down < 0 else (bottom, top)


@torch.no_grad()
def mark(judge: SceneJudge, pixels: Tensor, what: Sequence[Scene], told: Sequence[Told], batch: int = 64) -> Marks:
    """Judges pictures against what their captions told.

    Of a pair each half is judged: the two subjects, and their looks if they were told. Its background is not.

    Args:
        pixels: [B, 3, H, W] in [-1, 1].
    """
    names = heads()
    right = {head: torch.ones(len(what), dtype=torch.bool) for head in names}
    asked = {head: torch.zeros(len(what), dtype=torch.bool) for head in names}
    features = []
    for start in range(0, len(what), batch):
        rows = range(start, min(start + batch, len(what)))
        features.append(judge(pixels[start : rows.stop].float())["features"])
    for row, (scene, facts) in enumerate(zip(what, told, strict=True)):
        wanted = asked_of(facts)
        views = [pixels[row : row + 1].float()]
        if scene.relation is not None:
            wanted &= {"subject", "look"}
            views = list(halves(views[0], scene.relation))
        for view, figure in zip(views, scene.figures, strict=True):
            seen, truth = judge(view), answers(figure, scene.background)
            for head in wanted:
                asked[head][row] = True
                right[head][row] &= names[head][int(seen[head].argmax())] == truth[head]
    return Marks(right, asked, torch.cat(features))

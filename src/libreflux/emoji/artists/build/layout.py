"""What lies under each image token of a scene: which subject, by which artist, and which part of the drawing.

While the base is trained, a head reads this from its hidden image tokens: the layout is settled in the noise, where
the pictures' own loss says little about it. REPA does so with another network's features (Yu et al. 2024, arXiv
2410.06940); here the composer knows what there is to see.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from libreflux.emoji.artists.scenes import CELLS, Figure, Scene
from libreflux.emoji.artists.subjects import LOOKS, SIDE, all_subjects, drawing

GRID = 8  # image tokens each way
PARTS = 8  # of a drawing each way
OPAQUE = 0.3  # of the alpha's range: below this a token's centre is background
QUESTIONS = {"subject": len(all_subjects()) + 1, "look": len(LOOKS), "across": PARTS, "down": PARTS, "mirrored": 2}
"""Head → its answers. `subject` 0 is the background, where nothing else is asked."""
NOT_ASKED = -100


def _of_figure(figure: Figure) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, v, opaque) [GRID, GRID]: where each token's centre lies in the unmirrored drawing, in its sides."""
    centre = (np.arange(GRID) + 0.5) / GRID * CELLS
    u, v = np.meshgrid((centre - figure.column) / figure.cells, (centre - figure.row) / figure.cells)
    if figure.mirrored:
        u = 1 - u
    alpha = np.asarray(drawing(figure.subject.name, figure.look).getchannel("A"))
    inside = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    row, column = ((np.clip(share, 0, 0.9999) * SIDE).astype(int) for share in (v, u))
    return u, v, inside & (alpha[row, column] > OPAQUE * 255)


def labels(what: Scene) -> np.ndarray:
    """[len(QUESTIONS), GRID²] int16: the answers for each image token, row by row."""
    names = [subject.name for subject in all_subjects()]
    out = np.full((len(QUESTIONS), GRID, GRID), NOT_ASKED, np.int16)
    out[0] = 0
    for figure in what.figures:
        u, v, opaque = _of_figure(figure)
        parts = ((np.clip(share, 0, 0.9999) * PARTS).astype(int) for share in (u, v))
        answers = (names.index(figure.subject.name) + 1, LOOKS.index(figure.look), *parts, int(figure.mirrored))
        for question, answer in enumerate(answers):
            out[question] = np.where(opaque, answer, out[question])
    return out.reshape(len(QUESTIONS), -1)


class LayoutHead(nn.Module):
    """Reads the layout from hidden image tokens [B, GRID², width]."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(QUESTIONS.values()))

    def loss(self, hidden: Tensor, truth: Tensor) -> Tensor:
        """The sum of every question's cross-entropy; `truth` [B, len(QUESTIONS), GRID²] as of `labels`."""
        logits = self.heads(self.norm(hidden)).split(list(QUESTIONS.values()), dim=-1)
        asked = zip(logits, truth.long().unbind(1), strict=True)
        return torch.stack(
            [F.cross_entropy(each.flatten(0, 1), right.flatten(), ignore_index=NOT_ASKED) for each, right in asked]
        ).sum()

"""Both text encoders learn to read captions before any picture is seen, as those of FLUX come trained from elsewhere.

Each is asked, through heads that are thrown away, which facts a caption tells. The encoders are then frozen: learnt by
the pictures' loss alone, a subject's name is told from another's only after more than a thousand steps.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from libreflux import seeding
from libreflux.emoji.artists import captions as grammar
from libreflux.emoji.artists import judge as judges
from libreflux.emoji.artists import scenes
from libreflux.emoji.artists.captions import Told
from libreflux.emoji.artists.scenes import Scene
from libreflux.emoji.artists.subjects import LOOKS, all_subjects
from libreflux.emoji.build.base import EDGE, condition
from libreflux.emoji.build.stage import Stage, cosine
from libreflux.emoji.compose import COLOURS
from libreflux.model.text import TextConditioning, TextEncoders

STEPS, BATCH = 800, 128
SCENE_SEED, PAIRS, EMPTY = 61, 0.3, 0.03
KINDS = ("bare", "short", "full", "tags", "long")
NOT_TOLD = "not told"


def questions() -> dict[str, tuple[str, ...]]:
    """What is asked of a caption: fact → its answers, the first of them for a caption that does not tell it."""
    names = tuple(subject.name for subject in all_subjects())
    colours = tuple(COLOURS)
    facts = {
        "first": names,
        "second": names,
        "look": LOOKS,
        "other look": LOOKS,
        "size": judges.SIZES,
        "place": judges.PLACES,
        "relation": tuple(scenes.RELATIONS),
        "ground": tuple(scenes.KINDS),
        "colour": colours,
        "other colour": colours,
    }
    return {fact: (NOT_TOLD, *answers) for fact, answers in facts.items()}


def answers(what: Scene, told: Told) -> dict[str, str]:
    """The right answers for a caption that tells these facts; those that are left out are not told."""
    first, *others = what.figures
    right = {"first": first.subject.name}
    if told.look:
        right["look"] = first.look
    if what.relation is not None:
        right |= {"second": others[0].subject.name, "relation": what.relation}
        right |= {"other look": others[0].look} if told.look else {}
    else:
        right |= {"size": first.size} if told.size else {}
        right |= {"place": first.place} if told.place else {}
    if told.background:
        right |= {"ground": what.background.kind, "colour": what.background.first}
        right |= {"other colour": what.background.second} if what.background.second else {}
    return right


class Reader(nn.Module):
    """Logits of every question, from CLIP's pooled vector and from T5's tokens, each weighted by the question."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        counts = {fact: len(known) for fact, known in questions().items()}
        self.pooled = nn.ModuleList(nn.Linear(width, count) for count in counts.values())
        self.tokens = nn.ModuleList(nn.Linear(width, count) for count in counts.values())
        self.look_for = nn.Linear(width, len(counts))

    def forward(self, text: TextConditioning) -> list[tuple[Tensor, Tensor]]:
        """A pair [B, answers] for each question: by CLIP, by T5."""
        embeds, mask = text.padded()
        weights = self.look_for(embeds)
        if mask is not None:
            weights = weights.masked_fill(~mask[..., None].bool(), float("-inf"))
        seen = torch.einsum("btq,btd->qbd", weights.softmax(dim=1), embeds)
        return [
            (by_clip(text.pooled), by_t5(of_tokens))
            for by_clip, by_t5, of_tokens in zip(self.pooled, self.tokens, seen, strict=True)
        ]


def batch_at(step: int) -> tuple[list[str], list[dict[str, str]]]:
    """(captions, their right answers) of one step."""
    rng = seeding.rng(0, "artists-reading", step)
    texts, right = [], []
    for row in range(BATCH):
        what = scenes.scene(SCENE_SEED, step * BATCH + row, pairs=PAIRS, pool=all_subjects())
        kind = KINDS[rng.integers(len(KINDS) - 1)] if step % 4 else "long"
        empty = rng.random() < EMPTY
        texts.append("" if empty else grammar.captions(what)[kind])
        right.append({} if empty else answers(what, grammar.told_by(what, kind)))
    return texts, right


def train(work: Path, tokenized: TextEncoders, *, steps: int = STEPS) -> TextEncoders:
    """Train (or resume) the encoders, and return them frozen, averaged; `work/text.safetensors` keeps the state."""
    torch.manual_seed(3)
    reader = Reader()
    modules: dict[str, nn.Module] = {
        "clip": tokenized.text_encoder,
        "t5": tokenized.text_encoder_2,
        "reader": reader,
    }
    edge = (*EDGE, "reader")
    stage = Stage(work / "text.safetensors", modules, lr=2e-3, matrix_lr=5e-3, average=0.99, edge=edge)
    stage.resume()
    asked = questions()

    def loss_at(step: int) -> Tensor:
        texts, right = batch_at(step)
        total = torch.zeros(())
        for (fact, known), logits in zip(asked.items(), reader(condition(tokenized, texts)), strict=True):
            truth = torch.tensor([known.index(row.get(fact, NOT_TOLD)) for row in right])
            total = total + sum(F.cross_entropy(each, truth, label_smoothing=0.02) for each in logits)
        return total

    for _ in stage.run(steps, loss_at, cosine):
        pass
    stage.use_average()
    for encoder in (tokenized.text_encoder, tokenized.text_encoder_2):
        encoder.eval().requires_grad_(False)
    return tokenized

"""What the base stage trains on is what drawing gives it."""

from __future__ import annotations

from pathlib import Path

import torch

from libreflux.emoji import compose
from libreflux.emoji.build import base
from libreflux.model.opening import open_model


def test_trained_conditioning_is_that_of_drawing() -> None:
    text = open_model("emoji-base").load_text(dtype=torch.float32)
    scene = base.scenes()[1][0]
    prompts = ["", *compose.captions(scene).values(), "a fox, " * 60]  # beyond CLIP's 77 tokens
    ours, drawn = base.condition(text, prompts), text.encode(prompts, padding="drop", max_tokens=512)
    assert ours.lengths == drawn.lengths
    assert max(ours.lengths) > 77
    torch.testing.assert_close(ours.pooled, drawn.pooled, atol=1e-5, rtol=1e-4)
    for a, b in zip(ours.tokens, drawn.tokens, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rows_and_captions_of_a_step_belong_together() -> None:
    singles, pairs = base.scenes()
    everything = [*singles, *pairs]
    for step in (0, 7, base.LONG_EVERY - 1):
        rows, texts = base.batch_at(step, seed=0)
        for row, text in zip(rows, texts, strict=True):
            assert not text or text in compose.captions(everything[row]).values()


def test_the_shipped_subjects_are_the_listed_ones() -> None:
    listed = (Path(base.__file__).parent / "subjects.txt").read_text("utf-8").splitlines()
    labels = "; ".join(line.partition(":")[2] for line in listed if line and not line.startswith("#"))
    names = {label.split("=")[-1].strip() for label in labels.split(";") if label.strip()}
    assert names == {subject.name for subject in compose.subjects()}

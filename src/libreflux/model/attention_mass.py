"""How much attention each text token gets, in streaming form: no matrix of all queries by all keys is ever held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256
"""Of queries that are computed at a time."""
COLUMNS = 1024
"""Of image keys that are computed at a time."""
READERS = ("image", "own", "padding")
"""Groups of queries: the image's tokens, the prompt's own text tokens, and its padding."""


@dataclass(frozen=True)
class AttentionMass:
    """What the queries of one sample give to text tokens, in one block. With A = softmax(Q K^T / sqrt(D) + bias):

    Attributes:
        on_text: [3, H, T] fp32, mean of A[q, t] over the queries q of each of `READERS`; 0 for a group without queries.
        on_image: [3, H] fp32, mean over the same queries of the sum of A[q, k] over image keys: with `on_text` summed
            over T it is 1, for a group that has queries.
        where: [T, N] fp32, mean over heads of A[q, t] at each of the image's tokens q.
    """

    on_text: Tensor
    on_image: Tensor
    where: Tensor


@torch.no_grad()
def attention_mass(
    query: Tensor,
    key: Tensor,
    *,
    text: int,
    own: int,
    bias: Tensor | None = None,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> AttentionMass:
    """Attention that each text token gets, by an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).

    Args:
        query, key: [S, H, D], text first, after norms and rotary embedding; computed in fp32 whatever their dtype.
        text: how many of the S are text, T; at least one is image.
        own: how many at the start of the text are the prompt's own, its end token included.
        bias: [S] added to the logits of each key: -inf is never seen. A text token that is never seen does not read
            either: it is there because another sample of the batch is longer. None is 0 everywhere.
        rows, columns: how many queries, and image keys, are computed at a time.
    """
    scale = query.shape[-1] ** -0.5
    queries, keys = query.transpose(0, 1), key.transpose(0, 1)
    bias = torch.zeros(len(key), device=key.device) if bias is None else bias.float()
    text_keys, text_bias = keys[:, :text].float(), bias[:text]
    length, heads = query.shape[:2]
    on_text = torch.zeros(len(READERS), heads, text, device=query.device)
    on_image = torch.zeros(len(READERS), heads, device=query.device)
    where = torch.zeros(text, length - text, device=query.device)
    counts = [length - text, min(own, text), text - own]
    if own < text:
        reading = text_bias.isfinite()  # fillers of a batch do not read
        counts = [counts[0], int(reading[:own].sum()), int(reading[own:].sum())]
    for reader, first, last in ((0, text, length), (1, 0, min(own, text)), (2, own, text)):
        for start in range(first, last, rows):
            here = slice(start, min(start + rows, last))
            block = queries[:, here].float() * scale
            largest, total = _over_image(block, keys[:, text:], bias[text:], columns)
            scores = block @ text_keys.transpose(1, 2) + text_bias
            top = torch.maximum(largest, scores.amax(dim=-1))
            image = total * (largest - top).exp()
            scores = (scores - top[..., None]).exp_()
            whole = image + scores.sum(dim=-1)
            scores /= whole[..., None]
            image = image / whole
            if reader == 0:
                where[:, start - text : here.stop - text] = scores.mean(dim=0).T
            elif own < text:
                kept = reading[here].float()
                scores, image = scores * kept[:, None], image * kept
            on_text[reader] += scores.sum(dim=1)
            on_image[reader] += image.sum(dim=1)
    for reader, count in enumerate(counts):
        on_text[reader] /= max(1, count)
        on_image[reader] /= max(1, count)
    return AttentionMass(on_text, on_image, where)


def _over_image(block: Tensor, keys: Tensor, bias: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """([H, R] largest logit m, [H, R] sum of exp(logit - m)) over image keys, some columns at a time."""
    largest = block.new_full(block.shape[:2], -math.inf)
    total = torch.zeros_like(largest)
    for here in _slices(keys.shape[1], columns):
        scores = block @ keys[:, here].float().transpose(1, 2) + bias[here]
        top = torch.maximum(largest, scores.amax(dim=-1))
        total = total * (largest - top).exp() + (scores - top[..., None]).exp_().sum(dim=-1)
        largest = top
    return largest, total


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))

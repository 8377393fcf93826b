"""How far the velocity depends on the padding of its text, which says nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.flow.path import interpolate
from libreflux.model.facts import Facts
from libreflux.model.text import KNOWN_PADDING, TextConditioning, TextEncoders
from libreflux.probing.context import OWN, PaddingTexts, ProbeContext
from libreflux.probing.drawing import mean_square
from libreflux.probing.held_out import model_velocity
from libreflux.probing.metrics.bootstrap import measured, root_ratio
from libreflux.probing.metrics.measures import Velocity, paired_noise
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import Plan, Section, SectionResult
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt

PROMPTS = 4
"""Different prompts of each length."""
FURTHER = 128
"""The model's own padding is compared with itself, padded so many tokens further."""
SMALL = 500_000_000
"""A model of fewer parameters is compared in fp32, so that rounding hides nothing."""

Fields = Callable[[TextConditioning], Velocity]


def encode(encoders: TextEncoders, facts: Facts, captions: Sequence[str], settings: Settings) -> PaddingTexts:
    """Prompts of every length that the model reads, under every padding that can be encoded.

    `OWN` is the model's own padding as it is used; under its own name it is `FURTHER` tokens longer.
    """
    found = {}
    for tokens in (one for one in settings.padding_tokens if one <= facts.max_tokens):
        prompts = [long_prompt(encoders, captions[start:] or captions, tokens) for start in range(PROMPTS)]
        found[OWN, tokens] = encoders.encode(prompts, padding=facts.text_padding, max_tokens=facts.max_tokens)
        for padding in KNOWN_PADDING:
            width = facts.max_tokens + (FURTHER if padding == facts.text_padding else 0)
            found[padding, tokens] = encoders.encode(prompts, padding=padding, max_tokens=width)
    return {key: text.to("cpu") for key, text in found.items()}


def long_prompt(encoders: TextEncoders, captions: Sequence[str], tokens: int) -> str:
    """Captions one after another, cut at a word: T5 reads `tokens` tokens or a few less, its end token included."""
    words: list[str] = []
    while len(words) < tokens:
        words += ". ".join(captions).split()

    def fits(count: int) -> bool:
        return encoders.count_tokens([" ".join(words[:count])], max_tokens=10**6)[0] <= tokens

    low, high = 1, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return " ".join(words[:low])


def plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    """Two passes for every comparison, three for those in a batch."""
    comparisons = 2 * len(KNOWN_PADDING) * len(settings.padding_tokens) + 3
    return Plan(passes=comparisons * settings.padding_pictures * len(settings.padding_sigmas))


@torch.no_grad()
def measure(context: ProbeContext) -> SectionResult:
    """`padding` by padding and prompt length, and `padding_batch`: a prompt alone and beside the longest one."""
    settings, texts = context.settings, context.padding_texts
    latents, ids = _pictures(context)
    transformer = exact(context.transformer)

    def fields(text: TextConditioning) -> Velocity:
        plain = model_velocity(transformer, text, guidance=context.embedded)

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            context.advance(len(x))
            return plain(x, sigma)

        return counted

    def differ(a: Sequence[TextConditioning], b: Sequence[TextConditioning]) -> tuple[np.ndarray, np.ndarray]:
        return differences(fields, latents, ids, a, b, settings.padding_sigmas, settings.seed)

    own = {tokens: alone(text) for (padding, tokens), text in texts.items() if padding == OWN}
    compared = {
        ("padding", padding, tokens): differ(own[tokens], alone(text))
        for (padding, tokens), text in texts.items()
        if padding != OWN
    }
    if own:
        beside = [TextConditioning.cat([text, own[max(own)][0]]) for text in own[min(own)]]
        compared["padding_batch", context.facts.text_padding, 0] = differ(own[min(own)], beside)
    rows, everyone = list[Measure](), {"all": np.arange(len(ids))}
    for (name, padding, tokens), found in compared.items():
        at: dict[str, Coordinate] = {"padding": padding, "tokens": tokens} if name == "padding" else {}
        theory = 0.0 if context.facts.text_padding == padding == "drop" else None
        rows += measured(
            name,
            at,
            root_ratio(*found),
            len(ids),
            everyone,
            seed=settings.seed,
            reference=theory,
            unit="of ‖v‖",
            over="pictures",
        )
    return SectionResult(rows)


def differences(
    fields: Fields,
    latents: Tensor,
    ids: Sequence[str],
    own: Sequence[TextConditioning],
    other: Sequence[TextConditioning],
    sigmas: Sequence[float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """([N], [N]): mean of (v_other − v_own)² and of v_own² at N pictures, averaged over sigmas.

    Args:
        fields: prompts to velocity.
        latents: [N, C, h, w].
        own, other: K texts each, of one prompt or several; picture i is seen with the (i mod K)-th, and its velocity
            is that of the text's first prompt.
    """
    above, below = np.zeros(len(ids)), np.zeros(len(ids))
    for row, name in enumerate(ids):
        for sigma in sigmas:
            noise = paired_noise(latents.shape[1:], seed, name, sigma)[None].to(latents.device)
            x = interpolate(latents[row : row + 1], noise, sigma)
            one, two = (_first(fields, texts[row % len(texts)], x, sigma) for texts in (own, other))
            above[row] += mean_square(two - one).item() / len(sigmas)
            below[row] += mean_square(one).item() / len(sigmas)
    return above, below


def _first(fields: Fields, text: TextConditioning, x: Tensor, sigma: float) -> Tensor:
    count = len(text)
    return fields(text)(x.expand(count, *x.shape[1:]), torch.full((count,), sigma, device=x.device))[:1]


def alone(text: TextConditioning) -> list[TextConditioning]:
    """Each prompt by itself."""
    return [text.index([row]) for row in range(len(text))]


def exact(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A small model's copy in fp32, another one as it is."""
    if sum(tensor.numel() for tensor in transformer.state_dict().values()) >= SMALL:
        return transformer
    return copy.deepcopy(transformer).float()


def _pictures(context: ProbeContext) -> tuple[Tensor, tuple[str, ...]]:
    """The first held-out pictures of one shape."""
    part = next(context.held_out.batches(context.settings.padding_pictures))
    return part.latents.to(context.transformer.device), part.sample_ids


SECTION = Section("padding", 2, plan, measure)

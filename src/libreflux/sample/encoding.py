"""Prompts to conditioning as a call asks for them: values checked, and what an encoder does not see told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from libreflux import plainjson
from libreflux.errors import OptionError, RecipeError
from libreflux.model.device import release
from libreflux.model.facts import Facts
from libreflux.model.text import TextConditioning, TextEncoders
from libreflux.printing import counted, get_logger
from libreflux.values import is_whole

logger = get_logger(__name__)

Encoded = Callable[[int, int], None]
"""Told how many texts of how many are encoded."""


@dataclass(frozen=True)
class Text:
    """What a picture asks of the encoders, for its prompt or for its negative prompt.

    Attributes:
        prompt: CLIP's text, and T5's.
        prompt_2: T5's, where it is another.
        max_tokens: T5's limit; None is the model's own.
    """

    prompt: str
    prompt_2: str | None = None
    max_tokens: int | None = None


def encode_prompts(
    encoders: TextEncoders,
    facts: Facts,
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    max_tokens: int | None = None,
) -> TextConditioning:
    """P prompts under a model's own text padding; warns of what CLIP does not see, as `TextEncoders.encode` of T5.

    Args:
        encoders: the model's.
        facts: the model's.
        prompts: texts for CLIP and T5.
        prompts_2: as many other texts for T5; None is `prompts`.
        max_tokens: T5's limit, 1 to the model's own, which None is.

    Raises:
        RecipeError: a limit out of range, or numbers of texts that do not agree.
        ModelError: a text padding that is not known.
    """
    check_max_tokens(facts, max_tokens)
    if prompts_2 is not None and len(prompts_2) != len(prompts):
        raise RecipeError(
            f"{counted(len(prompts_2), 'second prompt')} for {counted(len(prompts), 'prompt')}", hint="give one each"
        )
    _check_text(*prompts, *(prompts_2 or ()))
    _tell_unseen(encoders, prompts, apart=prompts_2 is not None)
    limit = facts.max_tokens if max_tokens is None else max_tokens
    return encoders.encode(prompts, padding=facts.text_padding, max_tokens=limit, prompts_2=prompts_2)


def _check_text(*texts: str) -> None:
    for text in texts:
        if not plainjson.is_text(text):
            raise RecipeError(f"half a character in {text[:40]!r}", where="prompt", hint="write it as UTF-8")


def _tell_unseen(encoders: TextEncoders, prompts: Sequence[str], *, apart: bool) -> None:
    for prompt in dict.fromkeys(prompts):
        if unseen := encoders.unseen_by_clip(prompt):
            other = "nor does T5, which has a prompt of its own" if apart else "T5 does, up to its own limit"
            logger.warning("prompt too long for CLIP, which does not see %r; %s", _short(unseen), other)


def untold(done: int, total: int) -> None:
    """Nobody is told."""


def encode_ahead(
    encoders: TextEncoders, facts: Facts, texts: Iterable[Text], told: Encoded = untold
) -> dict[Text, TextConditioning]:
    """Every text on the CPU, so that its encoders can go: alone, as batch mates have a say in the last bits.

    Encoders and transformer are then never in memory together: `open_model(name, parts=("text",))`, this, `del`,
    `LibreFluxPipeline.from_model(open_model(name, parts=("transformer", "vae")))` and `prompt_conditioning`.

    Raises:
        RecipeError, ModelError: see `encode_prompts`.
    """
    found = dict[Text, TextConditioning]()
    wanted = list(dict.fromkeys(texts))
    for text in wanted:
        second = None if text.prompt_2 is None else [text.prompt_2]
        found[text] = encode_prompts(encoders, facts, [text.prompt], second, text.max_tokens).to("cpu")
        told(len(found), len(wanted))
    return found


def encode_in_turn(
    encoders: TextEncoders, facts: Facts, texts: Iterable[Text], device: torch.device, told: Encoded = untold
) -> dict[Text, TextConditioning]:
    """What `encode_ahead` gives, to the bit, with one encoder on the device at a time.

    Args:
        encoders: on the CPU. T5 comes whole, reads all texts and goes, then CLIP does; nothing of them is left.
        facts: the model's.
        texts: what is encoded.
        device: where the encoders compute.
        told: of the texts that T5 has read, which takes nearly all of the time.

    Raises:
        RecipeError, ModelError: see `encode_prompts`.
    """
    wanted = list(dict.fromkeys(texts))
    for text in wanted:
        check_max_tokens(facts, text.max_tokens)
        _check_text(text.prompt, text.prompt_2 or "")
        _tell_unseen(encoders, [text.prompt], apart=text.prompt_2 is not None)

    def by_t5(text: Text) -> tuple[list[Tensor], list[int] | None]:
        limit = facts.max_tokens if text.max_tokens is None else text.max_tokens
        read = text.prompt if text.prompt_2 is None else text.prompt_2
        tokens, favoured = encoders.encode_t5([read], padding=facts.text_padding, max_tokens=limit)
        return [each.cpu() for each in tokens], favoured

    with _visiting(encoders.text_encoder_2, device):
        tokens = []
        for text in wanted:
            tokens.append(by_t5(text))
            told(len(tokens), len(wanted))
    with _visiting(encoders.text_encoder, device):
        pooled = [encoders.encode_clip([text.prompt]).cpu() for text in wanted]
    return {
        text: TextConditioning(read, vector, favoured)
        for text, (read, favoured), vector in zip(wanted, tokens, pooled, strict=True)
    }


@contextlib.contextmanager
def _visiting(encoder: nn.Module, device: torch.device) -> Iterator[None]:
    """An encoder on the device in the block, and nowhere after it."""
    encoder.to(device)
    try:
        yield
    finally:
        encoder.to("meta")
        release(device)


def check_max_tokens(facts: Facts, max_tokens: int | None, name: str = "max_sequence_length") -> None:
    """Raises OptionError for a limit out of the model's range; `name` is what the user calls it."""
    if max_tokens is not None and not (is_whole(max_tokens) and 1 <= max_tokens <= facts.max_tokens):
        raise OptionError(f"cannot be {max_tokens}", name, hint=f"use 1 to {facts.max_tokens}")


def listed(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def matched(negative: TextConditioning, count: int) -> TextConditioning:
    """As many negative prompts as prompts: one may serve all.

    Raises:
        RecipeError: another number of them.
    """
    if len(negative) == count:
        return negative
    if len(negative) == 1:
        return negative.repeat(count)
    raise RecipeError(
        f"{counted(len(negative), 'negative prompt')} for {counted(count, 'prompt')}",
        hint="give one for all, or one each",
    )


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."

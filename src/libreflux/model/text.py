"""Prompts to what FLUX is conditioned on: T5's tokens, ragged, and CLIP's pooled vector.

Padding values (see DESIGN, decision 2). `drop`: no padding reaches T5 or FLUX. `trim`: T5 sees its prompt padded to
`max_tokens` without a mask, as BFL runs it, and FLUX sees the prompt's own tokens only. `keep`: FLUX sees the padding
too, as FLUX.1 was trained. `bias`: like keep, but 1 is added to the attention logits of all that is not padding, as the
published LibreFLUX weights were trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from libreflux.errors import ModelError
from libreflux.model.keep_fp32 import cast, keep_wide
from libreflux.model.numerics import pinned
from libreflux.printing import get_logger

logger = get_logger(__name__)

TRAINED_PADDING = ("drop", "trim")  # what a cache can hold
KNOWN_PADDING = (*TRAINED_PADDING, "bias", "keep")
TOKENS_PER_PASS = 8192  # how many T5 tokens one forward pass takes, over all its prompts
_COUNTED_AT_ONCE = 4096  # texts


@dataclass(frozen=True)
class TextConditioning:
    """What the transformer sees of B prompts.

    Attributes:
        tokens: B tensors [S_i, D], T5's last hidden state; S_i >= 1; padding is in it under `keep` and `bias` only.
        pooled: [B, P], CLIP's last hidden state at its end-of-text token.
        favoured: under `bias`, how many tokens at the start of each prompt are its own; None under all others.
    """

    tokens: list[Tensor]
    pooled: Tensor
    favoured: list[int] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != self.pooled.shape[0]:
            raise ValueError(f"{len(self.tokens)} token sequences, {self.pooled.shape[0]} pooled vectors")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens per prompt."""
        return [sequence.shape[0] for sequence in self.tokens]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextConditioning:
        """The same on another device or in another dtype; None leaves it."""
        tokens = [sequence.to(device=device, dtype=dtype) for sequence in self.tokens]
        return TextConditioning(tokens, self.pooled.to(device=device, dtype=dtype), self.favoured)

    @staticmethod
    def cat(parts: Sequence[TextConditioning]) -> TextConditioning:
        """All prompts of all parts, in order; lengths may differ, but parts with `favoured` go with such alone."""
        favoured = [part.favoured for part in parts if part.favoured is not None]
        if favoured and len(favoured) < len(parts):
            raise ValueError("text of padding bias beside text of another")
        return TextConditioning(
            [sequence for part in parts for sequence in part.tokens],
            torch.cat([part.pooled for part in parts]),
            [count for counts in favoured for count in counts] if favoured else None,
        )

    def index(self, which: Sequence[int]) -> TextConditioning:
        """The prompts at these positions, in this order, repeats allowed."""
        favoured = None if self.favoured is None else [self.favoured[i] for i in which]
        return TextConditioning([self.tokens[i] for i in which], self.pooled[list(which)], favoured)

    def repeat(self, times: int) -> TextConditioning:
        """Each prompt `times` times in a row: a, a, b, b."""
        return self.index([i for i in range(len(self)) for _ in range(times)])

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """One batch: (tokens [B, max S_i, D] with zeros behind, mask bool [B, max S_i] or None when lengths agree)."""
        lengths = self.lengths
        if len(set(lengths)) == 1:
            return torch.stack(self.tokens), None
        embeds = torch.nn.utils.rnn.pad_sequence(self.tokens, batch_first=True)
        mask = torch.arange(embeds.shape[1]) < torch.tensor(lengths)[:, None]  # made here: a card would be waited for
        return embeds, mask.to(embeds.device, non_blocking=True)


class TextEncoders:
    """CLIP and T5 with their tokenizers, frozen.

    Args:
        tokenizer: CLIP's.
        text_encoder: CLIP.
        tokenizer_2: T5's.
        text_encoder_2: T5.
        by_block: their weights come to the device block by block, see `by_block.run_by_block`. Every pass costs all of
            them, so prompts of unequal lengths share one, the shorter ones padded behind a mask.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: CLIPTextModel,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_2: T5EncoderModel,
        *,
        by_block: bool = False,
    ) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2
        self.by_block = by_block
        for encoder in (text_encoder, text_encoder_2):
            keep_wide(encoder)  # whoever cast them as a whole: T5 in fp16 overflows

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoders:
        """Moves both encoders, in place; what transformers keeps in fp32 stays so."""
        for encoder in (self.text_encoder, self.text_encoder_2):
            cast(encoder, device, dtype)
        return self

    def encode(
        self, prompts: Sequence[str], *, padding: str, max_tokens: int, prompts_2: Sequence[str] | None = None
    ) -> TextConditioning:
        """Encode prompts; "" is one like another (T5: its end token alone). A result depends on its own prompt only.

        T5 reads up to `max_tokens` tokens, its end token included; what is longer is cut, with a warning. CLIP reads
        the first 77 of its own tokens, as FLUX does (see `unseen_by_clip`): it gives the pooled vector alone.

        Args:
            prompts: B texts.
            padding: "drop", "trim", "keep" or "bias".
            max_tokens: T5's limit, and under all but "drop" the length to which it is padded.
            prompts_2: B other texts for T5; None is `prompts`.

        Raises:
            ModelError: an unknown padding.
            ValueError: numbers of texts that do not agree.
        """
        if prompts_2 is not None and len(prompts_2) != len(prompts):
            raise ValueError(f"{len(prompts_2)} second prompts for {len(prompts)} prompts")
        read = prompts if prompts_2 is None else prompts_2
        tokens, favoured = self.encode_t5(read, padding=padding, max_tokens=max_tokens)
        return TextConditioning(tokens, self.encode_clip(prompts), favoured)

    @torch.no_grad()
    def encode_t5(
        self, prompts: Sequence[str], *, padding: str, max_tokens: int
    ) -> tuple[list[Tensor], list[int] | None]:
        """T5's half of `encode`: `tokens` and `favoured` of a `TextConditioning`; errors as there."""
        check_padding(padding)
        ids = [self._t5_ids(prompt, max_tokens) for prompt in prompts]
        tokens = self._t5(ids, None if padding == "drop" else max_tokens, cut=padding == "trim")
        return tokens, [len(each) for each in ids] if padding == "bias" else None

    def count_tokens(self, prompts: Sequence[str], *, max_tokens: int) -> list[int]:
        """T5 tokens of each prompt as `encode` gives them, without running an encoder."""
        return count_tokens(self.tokenizer_2, prompts, max_tokens=max_tokens)

    def unseen_by_clip(self, prompt: str) -> str:
        """The end of a prompt, as CLIP's tokenizer spells it, that is beyond its tokens (FLUX.1: 77); mostly ""."""
        ids = self.tokenizer(prompt, verbose=False).input_ids
        unseen: str = self.tokenizer.decode(ids[self._clip_limit - 1 : -1])  # the last that is seen is the end token
        return unseen.strip()

    @property
    def _clip_limit(self) -> int:
        return int(min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings))

    def _t5_ids(self, prompt: str, max_tokens: int) -> list[int]:
        # verbose=False: the tokenizer's own remark on length would come before ours, without its hint.
        ids = self.tokenizer_2(prompt, verbose=False).input_ids
        if len(ids) <= max_tokens:
            return ids
        _tell_cut(len(ids), max_tokens, prompt)
        return [*ids[: max_tokens - 1], self.tokenizer_2.eos_token_id]

    def _t5(self, ids: list[list[int]], pad_to: int | None, *, cut: bool) -> list[Tensor]:
        """T5's last hidden state per prompt; a batch of one length, or of one `pad_to`, needs no mask."""
        device = _input_device(self.text_encoder_2)
        pad = self.tokenizer_2.pad_token_id
        found: dict[int, Tensor] = {}
        for batch in _like_lengths(ids) if self.by_block and pad_to is None else _equal_lengths(ids, pad_to):
            width = pad_to or max(len(ids[i]) for i in batch)
            rows = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in batch], device=device)
            mask = None
            if pad_to is None and any(len(ids[i]) < width for i in batch):
                ends = torch.tensor([len(ids[i]) for i in batch], device=device)
                mask = (torch.arange(width, device=device) < ends[:, None]).long()
            with _pinned():
                hidden = self.text_encoder_2(input_ids=rows, attention_mask=mask).last_hidden_state
            for i, row in zip(batch, hidden, strict=True):
                kept = len(ids[i]) if cut or pad_to is None else width
                found[i] = row[:kept].clone()  # a view would keep the padding of the whole batch alive
        return [found[i] for i in range(len(ids))]

    @torch.no_grad()
    def encode_clip(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's half of `encode`: [B, P], `pooled` of a `TextConditioning`."""
        device = _input_device(self.text_encoder)
        pooled = []
        for start in range(0, len(prompts), 64):
            ids = self.tokenizer(
                list(prompts[start : start + 64]),
                padding="max_length",
                max_length=self._clip_limit,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
            with _pinned():
                hidden = self.text_encoder(input_ids=ids).last_hidden_state
            # Not `pooler_output`: it looks for config.eos_token_id, and falls silently to position 0 (one vector for
            # all prompts) when that is not the tokenizer's. CLIP pads with the end token, so the first one is the end.
            end = (ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)
            pooled.append(hidden[torch.arange(len(ids), device=device), end])
        if not pooled:
            return torch.zeros(0, self.text_encoder.config.hidden_size, device=device, dtype=self.text_encoder.dtype)
        return torch.cat(pooled)


def _pinned() -> AbstractContextManager[None]:
    """For a card wherever there is one: an encoder that comes to it block by block does not tell where it computes."""
    return pinned("cuda" if torch.cuda.is_available() else "cpu", drawing=True)


def count_tokens(
    tokenizer_2: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_tokens: int, warn: bool = True
) -> list[int]:
    """T5 tokens of each prompt as `TextEncoders.encode` gives them, by T5's tokenizer alone.

    Args:
        tokenizer_2: T5's.
        prompts: texts.
        max_tokens: T5's limit.
        warn: of prompts that will be cut, as `encode` does.
    """
    counts: list[int] = []
    for start in range(0, len(prompts), _COUNTED_AT_ONCE):
        part = list(prompts[start : start + _COUNTED_AT_ONCE])
        for prompt, row in zip(part, tokenizer_2(part, verbose=False).input_ids, strict=True):
            counts.append(min(len(row), max_tokens))
            if warn and len(row) > max_tokens:
                _tell_cut(len(row), max_tokens, prompt)
    return counts


def _tell_cut(count: int, max_tokens: int, prompt: str) -> None:
    logger.warning(
        "prompt has %d tokens, the model reads %d: the last %d are cut from %r",
        count,
        max_tokens,
        count - max_tokens,
        prompt if len(prompt) <= 60 else prompt[:57] + "...",
    )


def _input_device(encoder: torch.nn.Module) -> torch.device:
    """Where token ids go: to the encoder, unless its weights wait on meta for hooks that move ids as well."""
    device: torch.device = next(encoder.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def check_padding(padding: str) -> None:
    """Raises ModelError unless this text padding can be encoded."""
    if padding not in KNOWN_PADDING:
        raise ModelError(f"unknown text padding {padding!r}", hint=f"use one of {', '.join(KNOWN_PADDING)}")


def check_trained_padding(padding: str) -> None:
    """Raises ModelError unless text of this padding can be cached, and trained with."""
    check_padding(padding)
    if padding not in TRAINED_PADDING:
        raise ModelError(
            f"text padding {padding!r} is not supported yet in training and probes",
            hint=f"set text_padding to {' or '.join(TRAINED_PADDING)}, in the recipe or in libreflux.json",
        )


def _equal_lengths(ids: list[list[int]], pad_to: int | None) -> Iterator[list[int]]:
    """Positions in `ids`, in batches of one length, at most TOKENS_PER_PASS tokens each."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        groups.setdefault(pad_to or len(row), []).append(i)
    for length, members in sorted(groups.items()):
        size = max(1, TOKENS_PER_PASS // length)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _like_lengths(ids: list[list[int]]) -> Iterator[list[int]]:
    """Positions in `ids`, the shortest first, in batches of at most TOKENS_PER_PASS tokens, padding counted."""
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[i]) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

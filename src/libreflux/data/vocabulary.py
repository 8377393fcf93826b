"""Captions against what a model's text encoder can read: words that it does not know, captions that are too long."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase, T5Tokenizer

from libreflux.data.index import text_key
from libreflux.data.sources import Sample
from libreflux.model.load import one_line
from libreflux.model.locate import part_folder
from libreflux.printing import get_logger

logger = get_logger(__name__)

LOOKED_AT = 1000  # captions, evenly spread
WORTH_TELLING = 0.1  # share of the words: names and trigger words alone stay below it
_NAMED = 8
_WORD = re.compile(r"[^\W\d_]{2,}")
_cuts = get_logger("libreflux.model.text")


@dataclass(frozen=True)
class Foreign:
    """Words that T5 spells letter by letter or cannot spell at all: it was never taught what they mean.

    Attributes:
        share: of all words, in [0, 1].
        words: those, the most frequent first.
    """

    share: float
    words: tuple[str, ...]


def foreign_words(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Foreign:
    """The words of captions that are foreign to T5's tokenizer. Of many captions some are looked at."""
    places = np.linspace(0, len(captions) - 1, min(len(captions), LOOKED_AT)).astype(int)
    counts = Counter(word for place in places.tolist() for word in _WORD.findall(captions[place]))
    if not counts:
        return Foreign(0.0, ())
    words = sorted(counts)
    rows = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    unknown = {word for word, row in zip(words, rows, strict=True) if _is_foreign(word, row, tokenizer)}
    total = sum(counts.values())
    ranked = [word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if word in unknown]
    return Foreign(sum(counts[word] for word in unknown) / total, tuple(ranked))


def _is_foreign(word: str, row: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.unk_token_id in row:
        return True
    pieces = [piece for piece in tokenizer.convert_ids_to_tokens(row) if piece != "▁"]
    return len(word) > 2 and len(pieces) >= len(word)


def tell_foreign(model: Path, sources: Iterable[Sequence[Sample]]) -> None:
    """Warns if many of the captions' words are foreign to a model.

    Args:
        model: its folder.
        sources: samples of each source.
    """
    captions = [caption for samples in sources for sample in samples for caption in sample.captions]
    folder = part_folder(model, "tokenizer_2")
    if not folder.is_dir():  # whoever needs it says so
        return
    with one_line(folder):
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    found = foreign_words(captions, tokenizer)
    if found.share >= WORTH_TELLING:
        logger.warning(
            "%.0f %% of the captions' words are foreign to this model's text encoder, which spells them letter by "
            "letter or not at all: %s%s; say it in words that it knows, or choose another model",
            100 * found.share,
            ", ".join(found.words[:_NAMED]),
            ", …" if len(found.words) > _NAMED else "",
        )


def tell_cut(
    sources: Iterable[Sequence[Sample]],
    prompts: Sequence[str],
    token_counts: Callable[[np.ndarray], np.ndarray],
    max_tokens: int,
) -> None:
    """Warns, in a line, of all texts that fill the text encoder: what is beyond is not read.

    Args:
        sources: samples of each source.
        prompts: other texts.
        token_counts: keys of texts, see `index.text_key` → their tokens, at most `max_tokens`.
        max_tokens: that the model reads.
    """

    def full(texts: Iterable[str]) -> np.ndarray:
        return token_counts(np.fromiter(map(text_key, texts), np.int64)) >= max_tokens

    found = full(prompts)
    count, first = int(found.sum()), f"the prompt {prompts[int(found.argmax())][:40]!r}…" if found.any() else ""
    for samples in sources:
        found = full(caption for sample in samples for caption in sample.captions)
        count += int(found.sum())
        if not first and found.any():
            owners = np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples])
            first = f"that of {samples[int(owners[found.argmax()])].file}"
    if count:
        logger.warning(
            "texts of %d tokens or more, of which the model reads no more than these: %d, the first is %s",
            max_tokens,
            count,
            first,
        )


@contextlib.contextmanager
def cuts_untold() -> Iterator[None]:
    """The encoder's own warnings of texts that are cut, one for each, are left out: `tell_cut` tells them."""

    def passes(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("prompt has ")

    _cuts.addFilter(passes)
    try:
        yield
    finally:
        _cuts.removeFilter(passes)

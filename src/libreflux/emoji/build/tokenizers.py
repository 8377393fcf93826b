"""Small T5 and CLIP tokenizers fitted to a set of captions, in the formats that transformers' own classes load.

Both give every known word one token where the vocabulary has room, and spell unknown words in characters. T5: Unigram
(Kudo 2018), ids 0 `<pad>`, 1 `</s>`, 2 `<unk>`. CLIP: byte-level BPE with `</w>`, ids in OpenAI's order, never unknown.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from libreflux.errors import ModelError

WORD = re.compile(r"\w+|[^\w\s]")  # a word, or one punctuation mark
SPACE = "▁"
CHARACTERS = sorted(set(string.digits + string.ascii_lowercase + string.punctuation))
FALLBACK_LOGIT = 12.0  # how much less likely than the rarest word a single character is: words always win
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"


def build_t5_tokenizer(captions: Iterable[str], out: Path, vocab_size: int, max_tokens: int = 512) -> T5Tokenizer:
    """Write a T5 tokenizer for these captions into the folder `out` and return it as reloaded from there.

    Text is folded with sentencepiece's `nmt_nfkc_cf` (NFKC, lower case). The vocabulary is `<pad>`, `</s>`, `<unk>`,
    "▁" (the start of a word), the words with their "▁" by falling frequency, then printable ASCII and the captions'
    other characters, which spell what is not a known word. `</s>` is appended to every text.

    Args:
        captions: the texts to cover.
        out: folder for tokenizer.json and tokenizer_config.json; created.
        vocab_size: the most pieces to keep; words beyond it are spelled in characters. The result may be smaller.
        max_tokens: `model_max_length` of the tokenizer.

    Raises:
        ModelError: vocab_size leaves no room for the characters.
    """
    fold = _case_folding()
    words: Counter[str] = Counter()
    for caption in captions:
        for chunk in fold.normalize_str(caption).split():
            pieces = WORD.findall(chunk)
            words.update([SPACE + pieces[0], *pieces[1:]] if pieces else [])
    characters = sorted(set(CHARACTERS) | {c for word in words for c in word if c != SPACE})
    room = vocab_size - 4 - len(characters)
    if room < 0:
        raise ModelError(f"a T5 vocabulary of {vocab_size} has no room", hint=f"use at least {vocab_size - room}")
    ranked = sorted(words.items(), key=lambda item: (-item[1], item[0]))
    kept = [(word, count) for word, count in ranked if word not in characters][:room]
    total = sum(words.values()) or 1
    floor = math.log(1 / total) - FALLBACK_LOGIT
    # Punctuation inside a word costs the floor too, however frequent: nothing competes with it.
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, floor)]
    vocab += [(word, math.log(count / total)) for word, count in kept]
    vocab += [(character, floor) for character in characters]
    charsmap = base64.b64decode(json.loads(fold.__getstate__())["precompiled_charsmap"])
    tokenizer = T5Tokenizer(
        vocab=vocab,
        extra_ids=0,
        additional_special_tokens=None,
        _spm_precompiled_charsmap=charsmap,
        model_max_length=max_tokens,
    )
    tokenizer.save_pretrained(out)
    return T5Tokenizer.from_pretrained(out)


def build_clip_tokenizer(captions: Iterable[str], out: Path, vocab_size: int) -> CLIPTokenizer:
    """Write a CLIP tokenizer for these captions into the folder `out` and return it as reloaded from there.

    Byte-level BPE, lower-cased by CLIP's own normaliser. Ids as OpenAI's: 256 bytes, 256 bytes that end a word, merges,
    then `<|startoftext|>` and `<|endoftext|>`; eos is thus the largest id, and also the padding, as in CLIP-L. A
    CLIPTextConfig for it needs `eos_token_id=tokenizer.eos_token_id`. 77 tokens at most.

    Args:
        captions: the texts to learn merges from.
        out: folder for tokenizer.json, tokenizer_config.json; created.
        vocab_size: the most ids to use (at least 514); fewer when every word is whole before that.

    Raises:
        ModelError: vocab_size is below 514.
    """
    alphabet = _byte_alphabet()
    if vocab_size < 2 * len(alphabet) + 2:
        raise ModelError(f"a CLIP vocabulary of {vocab_size} has no room for all bytes", hint="use at least 514")
    ending = [character + "</w>" for character in alphabet]
    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    # The trainer counts only characters that it met towards its size, so it may learn too many; the cut below is exact.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - len(alphabet) - len(ending) - 2]
    tokens = [*alphabet, *ending]
    seen = set(tokens)
    for left, right in merges:
        if left + right not in seen:  # two merge paths may spell one token
            seen.add(left + right)
            tokens.append(left + right)
    tokens += [CLIP_BOS, CLIP_EOS]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(out)
    return CLIPTokenizer.from_pretrained(out)


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, printable ones first, in OpenAI's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


def _case_folding() -> normalizers.Normalizer:
    """sentencepiece's compiled `nmt_nfkc_cf` table: the only kind of normaliser that T5Tokenizer keeps on reload."""
    import tempfile

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a"] * 8),
        model_writer=model,
        vocab_size=8,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spiece.model"
        file.write_bytes(model.getvalue())
        return T5Tokenizer(**T5Tokenizer.convert_to_native_format(vocab_file=str(file))).backend_tokenizer.normalizer

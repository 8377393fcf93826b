"""Text conditioning: no padding anywhere, batch mates without effect, the pooled vector at the end token."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch

from libreflux.errors import ModelError
from libreflux.model.opening import open_model
from libreflux.model.text import TextConditioning, TextEncoders

PROMPTS = ["a red apple on blue", "", "a fox left of a rocket, on yellow", "zyx & Co.", "a fox", "a rocket on blue sky"]


@pytest.fixture(scope="module")
def encoders(tiny_model_dir: Path) -> TextEncoders:
    return open_model(tiny_model_dir).load_text()


def numbered(*lengths: int) -> TextConditioning:
    tokens = [torch.full((length, 2), float(i)) for i, length in enumerate(lengths)]
    return TextConditioning(tokens, torch.arange(len(lengths), dtype=torch.float32)[:, None])


@pytest.mark.parametrize("padding", ["drop", "trim"])
def test_batch_mates_have_no_effect(encoders: TextEncoders, padding: str) -> None:
    together = encoders.encode(PROMPTS, padding=padding, max_tokens=64)
    for i, prompt in enumerate(PROMPTS):
        alone = encoders.encode([prompt], padding=padding, max_tokens=64)
        torch.testing.assert_close(together.tokens[i], alone.tokens[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.pooled[i], alone.pooled[0], atol=1e-5, rtol=0)


def test_drop_is_t5_on_the_bare_prompt(encoders: TextEncoders) -> None:
    text = encoders.encode(PROMPTS, padding="drop", max_tokens=64)
    for prompt, tokens in zip(PROMPTS, text.tokens, strict=True):
        ids = encoders.tokenizer_2(prompt, return_tensors="pt").input_ids
        assert ids[0, -1] == 1  # </s> is kept
        with torch.no_grad():
            expected = encoders.text_encoder_2(ids).last_hidden_state[0]
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    assert text.lengths[1] == 1


def test_trim_is_t5_on_the_padded_prompt_cut_after_the_end(encoders: TextEncoders) -> None:
    text = encoders.encode(PROMPTS, padding="trim", max_tokens=40)
    ids = encoders.tokenizer_2(PROMPTS, padding="max_length", max_length=40, return_tensors="pt").input_ids
    with torch.no_grad():
        padded = encoders.text_encoder_2(ids).last_hidden_state
    for i, tokens in enumerate(text.tokens):
        assert len(tokens) == (ids[i] != 0).sum()
        torch.testing.assert_close(tokens, padded[i, : len(tokens)], atol=1e-5, rtol=0)
    # Padding changes what T5 says of real tokens: how far it is padded is a fact of the model.
    for other in (encoders.encode(PROMPTS, padding=p, max_tokens=m) for p, m in (("drop", 40), ("trim", 80))):
        assert (other.tokens[0] - text.tokens[0]).abs().max() > 0.01


def test_pooled_is_clip_at_its_end_token(encoders: TextEncoders) -> None:
    long = "a fox " * 60
    prompts = [*PROMPTS, long]
    pooled = encoders.encode(prompts, padding="drop", max_tokens=512).pooled
    for prompt, row in zip(prompts, pooled, strict=True):
        ids = encoders.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").input_ids
        assert ids[0, -1] == encoders.tokenizer.eos_token_id
        with torch.no_grad():
            expected = encoders.text_encoder(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    assert len({tuple(row.tolist()) for row in pooled}) == len(prompts)


@pytest.mark.parametrize(("configured", "transformers_is_right"), [(2, True), ("own", True), (49407, False)])
def test_pooled_does_not_hang_on_the_configured_end_token(
    encoders: TextEncoders, configured: int | str, transformers_is_right: bool
) -> None:
    """FLUX.1's own config says 2 (a legacy that means: the largest id); a default one names a token we do not have."""
    other = copy.deepcopy(encoders)
    other.text_encoder.eos_token_id = encoders.tokenizer.eos_token_id if configured == "own" else configured
    expected = encoders.encode(PROMPTS, padding="drop", max_tokens=64).pooled
    assert torch.equal(other.encode(PROMPTS, padding="drop", max_tokens=64).pooled, expected)
    ids = other.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = other.text_encoder(ids).pooler_output
    assert torch.allclose(theirs, expected, atol=1e-5) is transformers_is_right
    assert transformers_is_right or torch.allclose(theirs[0], theirs[-1])  # one vector for all


def test_long_prompts_are_cut_with_a_warning(encoders: TextEncoders, caplog: pytest.LogCaptureFixture) -> None:
    prompt = " ".join(["fox"] * 30)
    with caplog.at_level(logging.WARNING):
        text = encoders.encode([prompt], padding="drop", max_tokens=10)
    assert "31 tokens, the model reads 10: the last 21 are cut" in caplog.text
    expected = encoders.encode([" ".join(["fox"] * 9)], padding="drop", max_tokens=10)
    assert torch.equal(text.tokens[0], expected.tokens[0])  # the end token is still the last
    caplog.clear()
    encoders.encode([prompt], padding="drop", max_tokens=31)
    assert caplog.text == ""


@pytest.mark.parametrize("padding", ["keep", "bias"])
def test_padding_that_flux_sees(encoders: TextEncoders, padding: str) -> None:
    prompts = ["a fox", "a small green frog under a tree"]
    text = encoders.encode(prompts, padding=padding, max_tokens=24)
    trimmed = encoders.encode(prompts, padding="trim", max_tokens=24)
    assert text.lengths == [24, 24]
    for whole, own in zip(text.tokens, trimmed.tokens, strict=True):
        torch.testing.assert_close(whole[: len(own)], own)
    assert text.favoured == (trimmed.lengths if padding == "bias" else None)
    both = TextConditioning.cat([text.index([1]), text.repeat(2)])
    assert len(both) == 5
    if padding == "bias":
        first, second = trimmed.lengths
        assert both.favoured == [second, first, first, second, second] == both.to(dtype=torch.float64).favoured
        with pytest.raises(ValueError, match="beside"):
            TextConditioning.cat([text, trimmed])


def test_unknown_padding_is_refused(encoders: TextEncoders) -> None:
    with pytest.raises(ModelError, match="unknown text padding 'drops'"):
        encoders.encode(["a"], padding="drops", max_tokens=8)


def test_nothing_is_encoded_to_nothing(encoders: TextEncoders) -> None:
    text = encoders.encode([], padding="drop", max_tokens=8)
    assert len(text) == 0
    assert text.pooled.shape == (0, 16)


def test_padded_masks_exactly_the_padding() -> None:
    embeds, mask = numbered(2, 4, 1).padded()
    assert embeds.shape == (3, 4, 2)
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    for i, row in enumerate(embeds):
        assert (row[mask[i]] == i).all()
        assert (row[~mask[i]] == 0).all()


def test_equal_lengths_carry_no_mask() -> None:
    embeds, mask = numbered(3, 3).padded()
    assert mask is None
    assert embeds[:, :, 0].tolist() == [[0.0] * 3, [1.0] * 3]


def test_repeat_keeps_tokens_pooled_and_mask_together() -> None:
    text = numbered(2, 4).repeat(3)
    assert text.lengths == [2, 2, 2, 4, 4, 4]
    assert text.pooled[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    _, mask = text.padded()
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [2, 2, 2, 4, 4, 4]


def test_cat_index_and_to() -> None:
    text = TextConditioning.cat([numbered(1, 2), numbered(3)])
    assert text.lengths == [1, 2, 3]
    assert text.pooled[:, 0].tolist() == [0, 1, 0]
    assert text.index([2, 0, 0]).lengths == [3, 1, 1]
    half = text.to(dtype=torch.bfloat16)
    assert {t.dtype for t in [*half.tokens, half.pooled]} == {torch.bfloat16}
    with pytest.raises(ValueError, match="2 token sequences, 1 pooled"):
        TextConditioning([torch.zeros(1, 2)] * 2, torch.zeros(1, 3))


def test_what_clip_does_not_see(encoders: TextEncoders) -> None:
    words = ["fox"] * 75
    assert encoders.tokenizer(" ".join(words)).input_ids[76:] == [encoders.tokenizer.eos_token_id]
    assert encoders.unseen_by_clip(" ".join(words)) == "" == encoders.unseen_by_clip("")
    assert encoders.unseen_by_clip(" ".join([*words, "a", "red", "apple"])) == "a red apple"
    seen, whole = (encoders.encode([p], padding="drop", max_tokens=99) for p in (" ".join(words), "fox " * 79))
    assert torch.equal(seen.pooled, whole.pooled)


def test_a_second_prompt_is_t5s(encoders: TextEncoders) -> None:
    both = encoders.encode(["a fox", "a rocket"], padding="drop", max_tokens=64, prompts_2=["on yellow", "on blue sky"])
    first, second = (
        encoders.encode(p, padding="drop", max_tokens=64) for p in (["a fox", "a rocket"], ["on yellow", "on blue sky"])
    )
    assert torch.equal(both.pooled, first.pooled)
    assert all(torch.equal(one, other) for one, other in zip(both.tokens, second.tokens, strict=True))
    with pytest.raises(ValueError, match="1 second prompts for 2 prompts"):
        encoders.encode(["a", "b"], padding="drop", max_tokens=64, prompts_2=["c"])

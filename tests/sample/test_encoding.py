"""Texts encoded ahead of the pictures, and what is said of those that are too long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from libreflux.errors import ModelError, RecipeError
from libreflux.model.opening import open_model
from libreflux.sample.encoding import Text, encode_ahead
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import Opened, tensor_of

LONG = " ".join(["fox"] * 75 + ["a", "red", "apple"])


def test_ahead_is_as_in_a_call(model: Opened, pipe: LibreFluxPipeline) -> None:
    assert model.text is not None
    texts = [Text("a fox"), Text("a red apple on blue", "a rocket", 3), Text("a fox")]
    found = encode_ahead(model.text, model.facts, texts)
    assert len(found) == 2
    for text in texts:
        alone = pipe.encode_prompt(text.prompt, text.prompt_2, text.max_tokens)
        assert torch.equal(found[text].tokens[0], alone.tokens[0])
        assert torch.equal(found[text].pooled, alone.pooled)
    with pytest.raises(RecipeError, match="max_sequence_length: cannot be 513; hint: use 1 to 512"):
        encode_ahead(model.text, model.facts, [Text("a fox", max_tokens=513)])
    for no_count in (2.5, True):
        with pytest.raises(RecipeError, match=f"max_sequence_length: cannot be {no_count}; hint: use 1 to 512"):
            encode_ahead(model.text, model.facts, [Text("a fox", max_tokens=no_count)])  # type: ignore[arg-type]


def test_a_pipeline_without_encoders_draws_the_same_in_int8_too(tiny_model_dir: Path) -> None:
    source = open_model(tiny_model_dir)
    found = encode_ahead(source.load_text(), source.facts, [Text("a fox"), Text("")])
    transformer = source.load_transformer(quantise=True)
    small = LibreFluxPipeline.from_parts(transformer, source.load_vae(), facts=source.facts)
    whole = LibreFluxPipeline.from_pretrained(tiny_model_dir, quantise=True)
    dense = LibreFluxPipeline.from_pretrained(tiny_model_dir)
    ready = {"prompt_conditioning": found[Text("a fox")], "negative_conditioning": found[Text("")]}
    first, same, other = (
        tensor_of(pipe(**given, seeds=1, num_inference_steps=2, output_type="latent"))
        for pipe, given in ((small, ready), (whole, {"prompt": "a fox"}), (dense, ready))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with pytest.raises(ModelError, match="no text encoders"):
        small("a fox")


def test_what_clip_does_not_see_is_told_once(pipe: LibreFluxPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe.encode_prompt([LONG, "a fox", LONG])
    (record,) = caplog.records
    assert "does not see 'a red apple'; T5 does" in record.getMessage()
    caplog.clear()
    pipe.encode_prompt(LONG, "a fox")
    assert "does not see 'a red apple'; nor does T5" in caplog.text
    caplog.clear()
    pipe.encode_prompt("a fox", LONG)
    assert not caplog.records  # T5's limit is 512

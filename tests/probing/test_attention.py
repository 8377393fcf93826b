"""What is recorded of a picture's attention: layouts, changed texts, and the numbers and sentence that come of it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from libreflux.errors import ModelError
from libreflux.model.text import TextConditioning
from libreflux.probing.attention import (
    AttentionRecord,
    AttentionWatcher,
    TextLayout,
    altered_texts,
    record_bytes,
    relative_change,
)
from libreflux.probing.attention_found import AttentionFound, found_in, sentence
from libreflux.probing.report import heat
from libreflux.probing.report.attention_page import PromptShown, page
from libreflux.sample.guidance import watched_passes
from libreflux.sample.pipeline import LibreFluxPipeline
from opened import opened, tensor_of

OWN, WIDTH = 5, 17
LAYOUT = TextLayout(tuple(f"▁w{i}" for i in range(OWN - 1)) + ("</s>",) + ("<pad>",) * (WIDTH - OWN), OWN)


def text(length: int, seed: int, favoured: int | None = None) -> TextConditioning:
    generator = torch.Generator().manual_seed(seed)
    tokens, pooled = torch.randn(length, 24, generator=generator), torch.randn(1, 16, generator=generator)
    return TextConditioning([tokens], pooled, None if favoured is None else [favoured])


@pytest.mark.parametrize(
    ("width", "own", "expected"),
    [
        (512, 12, {"words": (0, 11), "end_token": (11, 12), "near": (12, 52), "middle": (52, 472), "end": (472, 512)}),
        (17, 5, {"words": (0, 4), "end_token": (4, 5), "near": (5, 9), "middle": (9, 13), "end": (13, 17)}),
        (7, 5, {"words": (0, 4), "end_token": (4, 5), "middle": (5, 7)}),
        (5, 5, {"words": (0, 4), "end_token": (4, 5)}),
        (1, 1, {"end_token": (0, 1)}),
    ],
)
def test_regions_cover_every_token_once(width: int, own: int, expected: dict[str, tuple[int, int]]) -> None:
    regions = TextLayout(("x",) * width, own).regions
    found = {name.removeprefix("padding_"): (places.start, places.stop) for name, places in regions.items()}
    assert found == expected
    assert [place for places in regions.values() for place in places] == list(range(width))


def test_padding_is_taken_out_and_replaced_as_told() -> None:
    own, empty = text(WIDTH, 0), text(WIDTH, 1)
    found = altered_texts(own, LAYOUT, empty, None)
    [tokens] = own.tokens
    assert list(found) == [
        "padding_removed",
        "padding_replaced",
        "padding_near_removed",
        "padding_middle_removed",
        "padding_end_removed",
        "prompt_emptied",
    ]
    assert found["padding_removed"].tokens[0].equal(tokens[:OWN])
    assert found["padding_replaced"].tokens[0].equal(torch.cat([tokens[:OWN], empty.tokens[0][OWN:]]))
    assert found["padding_near_removed"].tokens[0].equal(torch.cat([tokens[:OWN], tokens[9:]]))
    assert found["padding_middle_removed"].tokens[0].equal(torch.cat([tokens[:9], tokens[13:]]))
    assert found["padding_end_removed"].tokens[0].equal(tokens[:13])
    assert all(one.pooled.equal(own.pooled) for name, one in found.items() if name != "prompt_emptied")
    assert found["prompt_emptied"] is empty
    assert altered_texts(text(WIDTH, 0, OWN), LAYOUT, text(WIDTH, 1, 1), None)["padding_removed"].favoured == [OWN]
    bare, padded = TextLayout(LAYOUT.tokens[:OWN], OWN), text(WIDTH, 2)
    assert altered_texts(text(OWN, 0), bare, empty, padded) == {"padding_added": padded, "prompt_emptied": empty}
    assert list(altered_texts(text(OWN, 0), bare, empty, None)) == ["prompt_emptied"]


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> LibreFluxPipeline:
    return opened(tiny_model_dir).pipeline()


def draw(pipe: LibreFluxPipeline, guidance: float, how: bool, negative: int = 3) -> torch.Tensor:
    return tensor_of(
        pipe(
            prompt_conditioning=text(WIDTH, 0),
            negative_conditioning=text(negative, 5),
            guidance_scale=guidance,
            batch_cfg=how,
            num_inference_steps=2,
            seeds=1,
            output_type="latent",
        )
    )


@pytest.mark.parametrize(
    ("guidance", "how", "negative"), [(1.0, True, 3), (3.0, True, 3), (3.0, True, WIDTH + 4), (3.0, False, 3)]
)
def test_a_watched_picture_has_the_same_bits(
    pipe: LibreFluxPipeline, guidance: float, how: bool, negative: int
) -> None:
    """In one pass beside a shorter or a longer negative prompt, in two, and unguided: the prompt's is recorded."""
    plain = draw(pipe, guidance, how, negative)
    altered = altered_texts(text(WIDTH, 0), LAYOUT, text(WIDTH, 1), None) | {"the same": text(WIDTH, 0)}
    told: list[None] = []
    watcher = AttentionWatcher(pipe.transformer, LAYOUT, altered, 2, lambda: told.append(None))
    with watched_passes(watcher):
        assert draw(pipe, guidance, how, negative).equal(plain)
    record = watcher.record
    blocks, heads, image = 3, 2, record.where.shape[2]
    assert record.on_text.shape == (2, blocks, 3, heads, WIDTH)
    assert record.kinds == ("double", "single", "single")
    assert len(record.sigmas) == 2
    assert float((record.on_text.sum(dim=-1) + record.on_image - 1).abs().max()) < 1e-5
    by_kind = record.where.mean(dim=2)  # over the image
    shares = record.share.mean(dim=(0, 2))
    assert float((by_kind - torch.stack([shares[0], shares[1:].mean(dim=0)])).abs().max()) < 1e-6
    assert len(told) == 2 * len(altered)
    assert watcher.changes["the same"] == [0.0, 0.0]
    assert all(min(values) > 1e-4 for name, values in watcher.changes.items() if name != "the same")
    size = sum(each.numel() * each.element_size() for each in (record.on_text, record.on_image, record.where))
    assert size == record_bytes(steps=2, double=1, single=2, heads=heads, text=WIDTH, image=image)
    # Of the first step, which starts from one noise however it is drawn, the masses are the same.
    again = AttentionWatcher(pipe.transformer, LAYOUT, {}, 2)
    with watched_passes(again):
        draw(pipe, 1.0, True)
    assert float((again.record.on_text[0] - record.on_text[0]).abs().max()) < 1e-6
    assert again.changes == {}


def test_a_watcher_that_fails_is_gone_afterwards(pipe: LibreFluxPipeline) -> None:
    plain, processors = draw(pipe, 1.0, True), dict(pipe.transformer.attn_processors)
    altered = {"too wide": TextConditioning([torch.zeros(3, 25)], torch.zeros(1, 16))}
    watcher = AttentionWatcher(pipe.transformer, LAYOUT, altered, 2)
    with pytest.raises(ModelError, match="25 and 16 wide"), watched_passes(watcher):
        draw(pipe, 1.0, True)
    assert pipe.transformer.attn_processors == processors
    kept = watcher.record.on_text.clone()
    assert draw(pipe, 1.0, True).equal(plain)
    assert watcher.record.on_text.equal(kept)


def test_flux_size_takes_what_the_docs_say() -> None:
    """1024 pixels, 28 steps, 512 text tokens."""
    assert record_bytes(steps=28, double=19, single=38, heads=24, text=512, image=4096) == 252_576_640


def planted(padding: float = 0.3) -> AttentionFound:
    """Image tokens give 0.2 to the first word and `padding` to the last padding token, from every step and head."""
    record = AttentionRecord(
        torch.zeros(2, 3, 3, 2, WIDTH),
        torch.full((2, 3, 3, 2), 1 - 0.2 - padding),
        torch.zeros(2, WIDTH, 4),
        ("double", "single", "single"),
        [1.0, 0.5],
    )
    record.on_text[..., 0], record.on_text[..., WIDTH - 1] = 0.2, padding
    record.where[:, WIDTH - 1, 3] = 1.0
    changes = {"padding_removed": [0.1, 0.3], "prompt_emptied": [0.5, 0.7]}
    pictures = {"padding_removed": 4.0, "prompt_emptied": 80.0}
    return found_in(record, prompt="a <b> fox", seed=3, layout=LAYOUT, velocity=changes, pictures=pictures)


def test_a_planted_token_is_found_and_told() -> None:
    found = planted()
    assert found.read == [WIDTH - 1]
    assert found.padding_share == pytest.approx(0.3)
    assert found.share("words") == pytest.approx(0.2)
    assert found.share("image") == pytest.approx(0.5)
    assert sum(found.readers["padding"].values()) == pytest.approx(1)
    assert found.even == pytest.approx(1 / (WIDTH + 4))
    assert found.by_step.shape == (2, WIDTH)
    assert found.by_block.shape == (3, WIDTH)
    assert np.allclose(found.heads["padding_end"], 0.3)
    assert sentence([found]) == (
        "Image tokens give 50.0 % of their attention to the text: 20.0 % to 4 word tokens, 0.0 % to the end token; "
        "30.0 % to 12 padding tokens, 1 with more than an even share (0 of the first 4, which get 0.0 %, and "
        "1 of the last 4, which get 30.0 %); without its padding the velocity changes by 20.0 % (with an empty prompt "
        "by 60.0 %) and the picture by 4.0 of 255."
    )
    assert "none with more than an even share;" in sentence([planted(padding=0.001)])
    several = sentence([found, dataclasses.replace(found, layout=TextLayout(LAYOUT.tokens[:OWN], OWN))])
    assert "0 to 12 padding tokens" in several
    bare = dataclasses.replace(found, layout=TextLayout(LAYOUT.tokens[:OWN], OWN), velocity={}, pictures={})
    assert sentence([bare]).endswith("; no padding reaches the model.")


def test_the_page_shows_it_and_loads_nothing() -> None:
    found, picture = planted(), Image.new("RGB", (32, 32), "#204080")
    where = {0: np.ones((2, 2, 2)), WIDTH - 1: np.array([[[0, 0], [0, 1.0]]] * 2)}
    one = PromptShown(found, picture, where, {"padding_removed": picture})
    shown = page([one], model="tiny & more", settings={"steps": "2"})
    assert shown == page([one], model="tiny & more", settings={"steps": "2"})
    assert "a &lt;b&gt; fox" in shown
    assert "<b> fox" not in shown
    assert "tiny &amp; more" in shown
    assert sentence([found]) in shown
    assert shown.count('type="radio"') == 2
    assert "<script" not in shown
    assert "http" not in shown.replace("http-equiv", "")
    assert "padding, 6.30 times an even share" in shown


def test_colours_say_how_many_times_an_even_share() -> None:
    assert heat.colour(0.0) == heat.NOTHING
    assert heat.colour(1e-9) == heat.RAMP[0]
    assert heat.colour(1e9) == heat.RAMP[-1]
    assert heat.colour(1.0) == heat.RAMP[len(heat.RAMP) // 2]
    lights = [sum(heat.colour(2.0**power)) for power in range(-5, 6)]
    assert lights == sorted(lights)


def test_a_map_lies_upright_over_its_picture() -> None:
    """Three rows of two tokens, of which the second one of the first row is read: top right is the clearest."""
    where = np.zeros((3, 2))
    where[0, 1] = 1.0
    [data] = re.findall(r"base64,([^\"]+)", heat.over(where, "pic0", "a map"))
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert (shown.width, shown.height) == (8, 12)
        alpha = np.asarray(shown.getchannel("A"), np.int16)
    assert np.unravel_index(alpha.argmin(), alpha.shape) == (0, 7)


def test_the_change_is_relative() -> None:
    plain = torch.tensor([3.0, 4.0])
    assert relative_change(2 * plain, plain) == pytest.approx(1.0)
    assert relative_change(plain, plain) == 0
    assert relative_change(0 * plain, 0 * plain) == 0

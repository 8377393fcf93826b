"""What the text encoders compute in, where they are meanwhile, and in which order captions go through them."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import sqlite3
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5EncoderModel

from caching import prepare
from libreflux.data import encode, precision
from libreflux.data.batches import Batches
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.index import text_key
from libreflux.data.prepare import encode_online, prepare_recipe
from libreflux.data.sources import Sample
from libreflux.errors import DataError, DeviceError, RunError
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.recipe import DataSource, load_recipe

SQUARE = View("square", 32)
Prepared = tuple[Cache, list[tuple[DataSource, list[Sample]]]]


def run(model: Path, data: Path, out: Path, **changed: Any) -> Prepared:
    source = DataSource(path=str(data))
    return prepare(str(model), [source], out=out, views=[SQUARE], text_padding="drop", **changed)


class Watch:
    """A model's parts with the CPU in a card's place, and what of earlier loadings was alive at each."""

    def __init__(self) -> None:
        self.opened: list[tuple[Any, ...]] = []
        self.alive: list[int] = []
        self.released: list[str] = []
        self._refs: list[weakref.ref[Any]] = []

    def watched(self, part: str) -> Callable[..., Any]:
        """ModelSource's way to load a part."""
        load = getattr(ModelSource, f"load_{part}")

        def loaded(source: ModelSource, *, device: str = "cpu", **options: Any) -> Any:
            self.alive.append(self.living())
            self.opened.append((part, device, options["dtype"], options.get("by_block", False)))
            found = load(source, **options)
            mine = [found] if part == "vae" else [found.text_encoder, found.text_encoder_2]
            self._refs += [weakref.ref(one) for one in mine]
            return found

        return loaded

    def release(self, device: str) -> None:
        self.released.append(device)

    def living(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self._refs)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    for part in ("vae", "text"):
        monkeypatch.setattr(ModelSource, f"load_{part}", made.watched(part))
    monkeypatch.setattr(encode, "release", made.release)
    return made


def test_settings_of_fp32_are_what_they_always_were(prepared: Prepared) -> None:
    cache, _ = prepared
    digests = {name: cache.settings[name] for name in ("vae", "text_encoders")}
    assert cache.settings == digests | {
        "text_padding": "drop",
        "max_tokens": 512,
        "precision": "float32",
        "latents": "float32",
        "text": "bfloat16",
    }


@pytest.mark.parametrize(
    ("device", "wanted", "dtype", "by_block"),
    [
        ("cpu", "auto", "float32", False),
        ("cpu", "bf16", "bfloat16", False),
        ("cuda", "auto", "bfloat16", False),
        ("mps", "auto", "bfloat16", False),
        ("cuda:1", "fp32", "float32", True),
    ],
)
def test_encoders_are_opened_in_turn_in_what_they_compute_in(
    tmp_path: Path,
    tiny_model_dir: Path,
    pictures: Path,
    watch: Watch,
    device: str,
    wanted: Any,
    dtype: str,
    by_block: bool,
) -> None:
    cache, _ = run(tiny_model_dir, pictures, tmp_path / "c", device=device, text_precision=wanted)
    assert watch.opened == [
        ("vae", device, torch.float32, False),
        ("text", device, getattr(torch, dtype), by_block),
    ]
    assert watch.alive == [0, 0]
    assert watch.living() == 0
    assert watch.released == [device, device]
    assert cache.settings.get("text_precision") == (None if dtype == "float32" else dtype)
    assert cache.settings["precision"] == "float32"


def test_bf16_text_is_the_encoders_in_bf16(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path
) -> None:
    wide, [(_, samples)] = prepared
    cache, _ = run(tiny_model_dir, pictures, tmp_path / "c", text_precision="bf16")
    text = open_model(tiny_model_dir).load_text(dtype=torch.bfloat16)
    captions = sorted({caption for sample in samples for caption in sample.captions})
    alone = [text.encode([caption], padding="drop", max_tokens=512).tokens[0] for caption in captions]
    found, other = cache.text(captions), wide.text(captions)
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(found.tokens, other.tokens, strict=True))
    for mine, one in zip(found.tokens, alone, strict=True):
        torch.testing.assert_close(mine, one, rtol=2**-5, atol=2**-5)
    name = SQUARE.name(0, "white")
    assert torch.equal(cache.latents(samples[0].id, name), wide.latents(samples[0].id, name))


@pytest.mark.parametrize(
    ("first", "device", "other", "told"),
    [
        ("fp32", "cuda", "bf16", "made with text_precision float32, now bfloat16; hint"),
        ("bf16", "cpu", "fp32", "made with text_precision bfloat16, now float32; hint"),
    ],
)
def test_auto_goes_on_as_the_cache_was_begun_and_another_name_is_refused(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path, watch: Watch, first: Any, device: str, other: Any, told: str
) -> None:
    out = tmp_path / "c"
    before, _ = run(tiny_model_dir, pictures, out, text_precision=first)
    with pytest.raises(DataError, match=told):
        run(tiny_model_dir, pictures, out, device=device, text_precision=other)
    watch.opened.clear()
    cache, _ = run(tiny_model_dir, pictures, out, device=device, prompts=["a fox"])
    assert watch.opened == [("text", device, precision.dtype_of(before.settings), (first, device) == ("fp32", "cuda"))]
    assert cache.settings == before.settings
    assert len(cache.text(["a fox"])) == 1


def test_parts_agree_with_the_part_that_was_begun_first(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path, watch: Watch
) -> None:
    out = tmp_path / "c"
    run(tiny_model_dir, pictures, out, part=(1, 2), device="cuda")
    with pytest.raises(DataError, match="text_precision bfloat16, now float32"):
        run(tiny_model_dir, pictures, out, part=(0, 2), text_precision="fp32")
    run(tiny_model_dir, pictures, out, part=(0, 2))  # on a CPU
    cache, sources = run(tiny_model_dir, pictures, out)
    assert cache.settings["text_precision"] == "bfloat16" == Cache(out, partial=True).settings["text_precision"]
    assert len(Batches(cache, sources, views=[SQUARE], seed=0)) == 7


def test_text_that_is_encoded_while_training_is_what_a_cache_would_hold(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path, watch: Watch
) -> None:
    """In the cache's dtype and up to its tokens, though the base itself, a few-step student, reads fewer."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    facts = json.loads((model / "libreflux.json").read_text())
    (model / "libreflux.json").write_text(json.dumps({**facts, "max_tokens": 12, "guidance": 1.0}))
    values = [f"model={model}", f"data.0.path={pictures}", "resolution=32", "steps=1", "text_precision=bf16"]
    recipe = load_recipe(None, [*values, f"out={tmp_path / 'full'}"])
    full, _ = prepare_recipe(recipe)
    assert full.cache.settings["max_tokens"] == 512
    watch.opened.clear()
    none, _ = prepare_recipe(load_recipe(None, [*values, f"out={tmp_path / 'none'}", "text_cache=none"]))
    assert [kind for kind, *_ in watch.opened] == ["vae", "text", "text"]  # the empty prompt, and for training
    assert {dtype for kind, _, dtype, _ in watch.opened if kind == "text"} == {torch.bfloat16}
    longest = ("a small green frog " * 7).strip()
    one, other = full.text([longest]), none.text([longest])
    assert one.lengths == other.lengths
    assert one.lengths[0] > 12
    torch.testing.assert_close(one.tokens[0], other.tokens[0], rtol=2**-5, atol=2**-5)
    cuda = encode_online(open_model(recipe.model), full.cache, "cuda")
    assert watch.opened[-1] == ("text", "cuda", torch.bfloat16, False)
    assert cuda([""]).lengths == [1]


def test_captions_go_through_the_shortest_first(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "SHARD_ITEMS", 4)
    _, [(_, samples)] = run(tiny_model_dir, pictures, tmp_path / "c")
    captions = {"", *(caption for sample in samples for caption in sample.captions)}
    text = open_model(tiny_model_dir).load_text()
    lengths = {caption: text.count_tokens([caption], max_tokens=512)[0] for caption in captions}
    expected = sorted(captions, key=lambda caption: (lengths[caption], caption))
    assert expected != sorted(captions)
    index = sqlite3.connect(tmp_path / "c" / "index.sqlite3")
    shards = dict(index.execute("SELECT key, shard FROM texts"))
    index.close()
    found = [shards[text_key(caption)] for caption in expected]
    assert [found.count(shard) for shard in dict.fromkeys(found)] == [4, 4, 4, 4]
    assert found == sorted(found)


def test_tokens_are_counted_without_an_encoder(
    tmp_path: Path,
    prepared: Prepared,
    tiny_model_dir: Path,
    pictures: Path,
    watch: Watch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    full, _ = prepared
    cache, [(_, samples)] = run(tiny_model_dir, pictures, tmp_path / "c", part=(1, 2), text_cache="none", max_tokens=20)
    assert [kind for kind, *_ in watch.opened] == ["vae"]  # the other part has the empty prompt
    captions = sorted({caption for sample in samples for caption in sample.captions})
    keys = [text_key(caption) for caption in captions]
    whole = full.token_counts(keys)
    assert cache.token_counts(keys).tolist() == np.minimum(whole, 20).tolist()
    assert whole.max() > 20
    told = f"texts of 20 tokens or more, of which the model reads no more than these: {(whole >= 20).sum()}, the first"
    assert caplog.text.count("the model reads") == 1
    assert told in caplog.text


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 18.00 GiB.\nlong advice")


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("CUDA error: unspecified launch failure\nlong advice")


@pytest.mark.parametrize(
    ("where", "precision", "device", "line"),
    [
        (
            AutoencoderKL,
            "auto",
            "cuda",
            "encoding a crop of 32 x 32 pixels, .*png: out of memory; "
            "hint: a smaller resolution, or prepare with device: cpu$",
        ),
        (
            AutoencoderKL,
            "auto",
            "cpu",
            "encoding a crop of 32 x 32 pixels, .*png: out of memory; hint: a smaller resolution$",
        ),
        (
            T5EncoderModel,
            "fp32",
            "cuda",
            "encoding 16 captions of up to [0-9]+ characters: out of memory; "
            "hint: prepare with shorter captions, or prepare with device: cpu$",
        ),
        (
            T5EncoderModel,
            "auto",
            "cuda",
            "encoding 16 captions .*: out of memory; "
            "hint: prepare with text_precision: fp32 .T5 goes block by block. in another cache, or .* device: cpu$",
        ),
    ],
)
def test_what_a_device_raises_is_one_line(
    tmp_path: Path,
    tiny_model_dir: Path,
    pictures: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    precision: Any,
    device: str,
    line: str,
) -> None:
    name = "encode" if where is AutoencoderKL else "forward"
    monkeypatch.setattr(where, name, out_of_memory)
    with pytest.raises(RunError, match=line) as refusal:
        run(tiny_model_dir, pictures, tmp_path / "c", device=device, text_precision=precision)
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(DeviceError, match=r"^encoding .*the device failed \(CUDA error: unspecified"):
        run(tiny_model_dir, pictures, tmp_path / "c", device=device, text_precision=precision)


def test_opening_without_memory_is_one_line(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", out_of_memory)
    with pytest.raises(RunError, match=r"^opening the text encoders: out of memory; hint: prepare with text_precision"):
        run(tiny_model_dir, pictures, tmp_path / "c")


def test_in_fp32_on_a_card_numbers_are_those_of_the_whole_encoders(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the card's place: weights come block by block, once for all captions of a shard."""
    full, [(_, samples)] = prepared
    monkeypatch.setattr(encode, "by_block", lambda dtype, device: True)
    sweeps: list[int] = []
    own = T5EncoderModel.forward

    @functools.wraps(own)
    def forward(*args: Any, **options: Any) -> Any:
        sweeps.append(1)
        return own(*args, **options)

    monkeypatch.setattr(T5EncoderModel, "forward", forward)
    cache, _ = run(tiny_model_dir, pictures, tmp_path / "c")
    assert sweeps == [1]
    captions = sorted({"", *(caption for sample in samples for caption in sample.captions)})
    found, wanted = cache.text(captions), full.text(captions)
    assert found.lengths == wanted.lengths
    assert len(set(found.lengths)) > 4
    for mine, theirs in zip(found.tokens, wanted.tokens, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-7, atol=1e-4)

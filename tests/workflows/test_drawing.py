"""What is in memory when: text encoders and transformer never together, and the same bits whichever way."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import cpu_offload, hooks
from accelerate.utils import set_module_tensor_to_device
from transformers import PreTrainedModel

import libreflux
from libreflux.errors import RecipeError
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.sample.metadata import GenerationRecord
from libreflux.workflows import drawing
from libreflux.workflows.drawing import open_for_drawing, texts_of
from libreflux.workflows.picture_options import Offload
from tiny import tiny_transformer

ORIGIN = GenerationRecord(
    prompt="a red apple", negative="a fox", seed=1, steps=2, guidance=3.0, width=32, height=32, model="tiny"
)
CPU = torch.device("cpu")


class Watch:
    """Which parts were loaded, and how many text encoders and transformers lived when a transformer was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.alive: list[tuple[int, int]] = []
        self._texts: list[weakref.ref] = []
        self._transformers: list[weakref.ref] = []

    def living(self) -> int:
        """How many text encoders, and weights of theirs, still live."""
        return sum(ref() is not None for ref in self._texts)

    def watched(self, part: str) -> Callable[..., Any]:
        """ModelSource's way to load a part."""
        load = getattr(ModelSource, f"load_{part}")

        def loaded(source: ModelSource, **options: Any) -> Any:
            if part == "transformer":
                texts, transformers = (
                    sum(one() is not None for one in ones) for ones in (self._texts, self._transformers)
                )
                self.alive.append((texts, transformers))
            found = load(source, **options)
            self.asked.append(part)
            if part == "text":
                both = (found.text_encoder, found.text_encoder_2)
                self._texts += [weakref.ref(kept) for one in both for kept in (one, *one.parameters())]
            if part == "transformer":
                self._transformers.append(weakref.ref(found))
            return found

        return loaded


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    for part in ("transformer", "vae", "text"):
        monkeypatch.setattr(ModelSource, f"load_{part}", made.watched(part))
    return made


def test_the_text_encoders_are_gone_when_the_transformer_comes(
    watch: Watch, tiny_model_dir: Path, tmp_path: Path
) -> None:
    prompts = ["a fox", "a red apple"]
    given: dict[str, Any] = {"model": tiny_model_dir, "steps": 2}
    libreflux.generate(prompts, **given, out=tmp_path / "auto")
    assert watch.asked == ["vae", "text", "transformer"]
    assert watch.alive == [(0, 0)]
    libreflux.generate(prompts, **given, out=tmp_path / "none", offload="none")
    assert watch.alive[1][0] > 10  # the watch sees what is alive
    for one in (tmp_path / "auto").iterdir():
        assert one.read_bytes() == (tmp_path / "none" / one.name).read_bytes()
    libreflux.remake(one, offload="none", out=tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == one.read_bytes()


def test_a_grid_holds_one_model_at_a_time(watch: Watch, tiny_model_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tiny_transformer(seed=5).save_pretrained(other / "transformer")
    done = libreflux.grid(
        ["a fox", "an apple"],
        model=[tiny_model_dir, other],
        guidance=[1, 3],
        steps=[1],
        negative="blue",
        out=tmp_path / "grid",
    )
    assert (done.drawn, done.total) == (8, 8)
    assert watch.alive == [(0, 0), (0, 0)]


class OnDevice:
    """Parameters that lie on the execution device, by the calls that bring and remove them; sizes in numbers."""

    def __init__(self) -> None:
        self._there: dict[tuple[int, str], int] = {}
        self.peak = 0
        self.brought: set[str] = set()

    def __call__(self, module: torch.nn.Module, name: str, device: Any, value: Any = None, **options: Any) -> None:
        set_module_tensor_to_device(module, name, device, value=value, **options)
        if str(device) == "meta":
            self._there.pop((id(module), name), None)
        else:
            self._there[id(module), name] = 0 if value is None else value.numel()
            self.brought.add(type(module).__name__)
        self.peak = max(self.peak, sum(self._there.values()))


def test_sequential_brings_the_encoders_block_by_block(
    tiny_model_dir: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = open_for_drawing(str(tiny_model_dir), device="cpu")
    whole, _ = dataclasses.replace(chosen, offload="auto").encoded(texts_of(ORIGIN))
    on_device = OnDevice()
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", on_device)
    blocks, kept = dataclasses.replace(chosen, offload="sequential").encoded(texts_of(ORIGIN))
    assert kept is None
    assert watch.living() == 0
    assert {"T5Block", "CLIPEncoderLayer", "Embedding"} <= on_device.brought
    text = open_model(tiny_model_dir).load_text()
    encoders = (text.text_encoder_2, text.text_encoder)
    sizes = [sum(one.numel() for one in encoder.parameters()) for encoder in encoders]
    largest = max(
        sum(one.numel() for one in module.parameters())
        for encoder in encoders
        for module in encoder.modules()
        if type(module).__name__ in ("T5Block", "CLIPEncoderLayer", "Embedding")
    )
    assert on_device.peak == largest < min(sizes)
    for key, encoded in whole.items():
        assert torch.equal(encoded.tokens[0], blocks[key].tokens[0])
        assert torch.equal(encoded.pooled, blocks[key].pooled)


def test_under_model_one_encoder_is_on_the_device_at_a_time(
    tiny_model_dir: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu", 0)  # the execution device, to be told from where the encoders rest
    moved: list[tuple[str, str]] = []
    own = PreTrainedModel.to

    def to(model: Any, *where: Any, **options: Any) -> Any:
        moved.append((type(model).__name__, str(where[0])))
        return own(model, *where, **options)

    chosen = open_for_drawing(str(tiny_model_dir), device="cpu")
    whole, _ = chosen.encoded(texts_of(ORIGIN))
    monkeypatch.setattr(PreTrainedModel, "to", to)
    found, kept = dataclasses.replace(chosen, offload="model", device=device).encoded(texts_of(ORIGIN))
    opened = [("CLIPTextModel", "cpu"), ("T5EncoderModel", "cpu")]
    visits = [(name, place) for name in ("T5EncoderModel", "CLIPTextModel") for place in ("cpu:0", "meta")]
    assert moved == [*opened, *visits]
    assert kept is None
    assert watch.living() == 0
    for key, text in whole.items():
        assert torch.equal(text.tokens[0], found[key].tokens[0])
        assert torch.equal(text.pooled, found[key].pooled)
        assert {one.device.type for one in (*found[key].tokens, found[key].pooled)} == {"cpu"}


@pytest.mark.parametrize("offload", ["auto", "model", "sequential"])
def test_the_vae_rests_on_the_cpu_where_parts_wait(
    tiny_model_dir: Path, offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "device_for", lambda *_: torch.device("meta"))
    vae = open_for_drawing(str(tiny_model_dir), offload=offload).vae
    assert vae.device.type == ("meta" if offload == "auto" else "cpu")


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_diffusers_hooks_draw_the_same_bits(
    tiny_model_dir: Path, offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the GPU's place: everything passes through the hooks, nothing is left where they put it."""
    # accelerate tells "cpu:0", which diffusers makes of "cpu", from "cpu".
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, _, **options: cpu_offload(part, CPU, **options))
    chosen = open_for_drawing(str(tiny_model_dir), device="cpu")
    expected = chosen.load([ORIGIN]).draw(ORIGIN)
    opened = dataclasses.replace(open_for_drawing(str(tiny_model_dir), device="cpu"), offload=offload).load([ORIGIN])
    resting = "meta" if offload == "sequential" else "cpu"
    for _ in range(2):
        assert opened.draw(ORIGIN).tobytes() == expected.tobytes()
        parts = (opened.pipe.transformer, opened.pipe.vae)
        assert {one.device.type for part in parts for one in part.parameters()} == {resting}


def test_int8_is_never_moved_layer_by_layer(tiny_model_dir: Path) -> None:
    chosen = open_for_drawing(str(tiny_model_dir), device="cpu", quantize="int8")
    with pytest.raises(RecipeError, match="offload sequential: does nothing for int8"):
        dataclasses.replace(chosen, offload="sequential").load([ORIGIN])


def test_the_nearest_facts_are_told_once(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    (folder / "libreflux.json").unlink()
    libreflux.generate("x", model=folder, steps=1, out=tmp_path / "x.png")
    assert caplog.text.count("taken for a model like FLUX.1-schnell") == 1

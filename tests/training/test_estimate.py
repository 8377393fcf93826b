"""The traced estimate against what really lives, phase by phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from libreflux.adapter.adapter import attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.data.crops import views
from libreflux.data.prepare import prepare_cache
from libreflux.model import latents as latents_of
from libreflux.model.opening import open_model
from libreflux.model.text import TextConditioning
from libreflux.recipe import Recipe
from libreflux.sample.output import decoded
from libreflux.training import estimate, phases, trace
from libreflux.training.live_bytes import LiveBytes
from libreflux.training.objective import NoisedBatch, flow_matching_loss
from tiny import tiny_transformer, tiny_vae


def test_live_bytes_follow_storages_from_birth_to_death() -> None:
    x = torch.empty(1000)
    with LiveBytes() as live:
        y = x + 1
        assert (live.live, live.peak) == (4000, 4000)
        z = y.view(10, 100)[2:]  # a view owns nothing
        assert live.live == 4000
        del y
        assert live.live == 4000  # the view still holds it
        del z
        assert (live.live, live.peak) == (0, 4000)
        x.add_(1)
        assert live.live == 0


def test_what_autograd_saves_is_counted() -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(8, 64)
    with LiveBytes() as live:
        y = layer(x).exp().sum()  # exp keeps its result
        assert live.live == 8 * 64 * 4 + 4
        y.backward()
        del y
        assert live.live == 64 * 64 * 4  # the weight's gradient


def test_the_trace_on_meta_is_the_real_step() -> None:
    def adapted(transformer: nn.Module) -> nn.Module:
        attach(transformer, resolve(linear_shapes(transformer), [Target(layers="**", factor=2)]), init="ones")
        return transformer

    real, meta = adapted(tiny_transformer()), adapted(tiny_transformer().to("meta"))
    text = TextConditioning([torch.randn(9, 24) for _ in range(3)], torch.randn(3, 16))
    latents = torch.randn(3, 16, 8, 6)
    with trace.attention_in_tiles(), LiveBytes() as live:
        flow_matching_loss(real, NoisedBatch(latents, latents, torch.rand(3), text)).sum().backward()
    traced = trace.trace_pass(meta, 3, (8, 6), 9)
    assert abs(traced - live.peak) < 0.01 * live.peak
    more = trace.trace_pass(meta, 6, (8, 6), 9)
    assert 1.5 * traced < more < 2.1 * traced


def test_flux_in_full_is_estimated_without_its_weights() -> None:
    config = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": False}
    flux = trace.meta_transformer(config, torch.bfloat16)
    layers = resolve(linear_shapes(flux), [Target(layers="**.attn.**", factor=3)])
    found = estimate.estimate(
        flux, layers, adapter_dtype=torch.bfloat16, batch=1, latent_size=(64, 64), text_tokens=512
    )
    assert abs(found.weights - 2 * 11_891.18e6) < 1e6
    assert found.adapter == 2 * sum(row.parameters for row in layers)
    assert found.moments == 2 * found.adapter
    assert found.gradient == 2 * found.adapter
    # 19 + 38 blocks at 1,536 tokens of 3,072 in bf16, a few dozen such tensors kept by each.
    assert 57 * 10 * 1536 * 3072 * 2 < found.activations < 57 * 40 * 1536 * 3072 * 2
    assert "device memory" in found.table()


def test_8_bit_moments_are_a_quarter_but_for_small_parameters() -> None:
    def found(eight: bool) -> phases.Estimate:
        flux = trace.meta_transformer({"num_layers": 1, "num_single_layers": 0}, torch.bfloat16)
        layers = resolve(linear_shapes(flux), [Target(layers="**.attn.to_q", factor=3)])
        return estimate.estimate(
            flux, layers, adapter_dtype=torch.float32, batch=1, latent_size=(8, 8), text_tokens=8, moments_8bit=eight
        )

    wide, narrow = found(False), found(True)
    small, large = 3 * 3, 1024 * 1024  # the two factors of a layer of 3,072 x 3,072
    assert wide.moments == 2 * 4 * (small + large)
    assert narrow.moments == 2 * (4 * small + large + 4 * large // 256)
    assert narrow.adapter == wide.adapter
    assert wide.checkpoint - narrow.checkpoint == wide.moments - narrow.moments


def test_the_total_is_the_largest_phase() -> None:
    parts: dict[str, Any] = {
        "weights": 1000,
        "adapter": 200,
        "moments": 400,
        "gradient": 30,
        "update": 7,
        "averages": 5000,
    }
    card, cpu = (phases.Estimate(on_cpu=on_cpu, activations=100, checkpoint=1, **parts) for on_cpu in (False, True))
    assert card.total == 1730 + phases.CARD_WORKSPACES + 18
    assert cpu.total == 6730 + 72 * 2**20 + 60  # 60: holes in the heap
    assert (card.host, cpu.host) == (5000 + 256, 0)  # averages, and the pinned copy that feeds them, rounded up
    assert (card.reserved, cpu.reserved) == (int(card.total * 22.6 / 19.7), cpu.total)
    small = dataclasses.replace(card, activations=3)
    assert small.total == 1637 + phases.CARD_WORKSPACES
    assert "optimizer step" in small.table()
    larger = phases.Phase(name="drawing samples", held=1600, activations=10**9, libraries=3)
    found = dataclasses.replace(card, between=(larger,))
    assert (found.total, found.largest) == (10**9 + 1603, larger)
    assert next(line for line in found.table().splitlines() if "<-" in line).startswith("drawing samples")
    assert dataclasses.replace(card, averages=0).host == 0


def rows(table: str) -> dict[str, int]:
    """The table's names with their MiB."""
    return {line[:44].strip(): int(line[44:].split()[0].replace(",", "")) for line in table.splitlines()}


def test_the_parts_of_training_add_up_to_its_row() -> None:
    parts = ("weights", "adapter", "moments", "gradient", "activations", "update", "averages", "encoders")
    sizes = {name: 2 ** (20 + number) for number, name in enumerate(parts)}
    for on_cpu in (False, True):
        found = phases.Estimate(on_cpu=on_cpu, checkpoint=1, **sizes)
        lines = found.table().splitlines()
        inside = rows("\n".join(line for line in lines if line.startswith("  ")))
        assert len(inside) == (8 if on_cpu else 7)
        assert abs(sum(inside.values()) - rows(found.table())["training"]) <= 4  # each is rounded


def alive(work: Callable[[], object]) -> int:
    with torch.no_grad(), trace.attention_in_tiles(), LiveBytes() as live:
        work()
    return live.peak


def test_a_pass_without_gradient_is_traced_on_one_of_like_blocks() -> None:
    transformer = tiny_transformer()
    layers = resolve(linear_shapes(transformer), [Target(layers="single_transformer_blocks.1.**", factor=2)])
    attach(transformer, layers, init="ones")  # so that the two single blocks differ
    text = TextConditioning([torch.randn(9, 24) for _ in range(3)], torch.randn(3, 16))
    latents = torch.randn(3, 16, 8, 6)
    noised = NoisedBatch(latents, latents, torch.rand(3), text)
    real = alive(lambda: flow_matching_loss(transformer, noised))
    names = [name for name, _ in transformer.named_modules()]
    meta = transformer.to("meta")
    traced = trace.trace_pass(meta, 3, (8, 6), 9, backward=False)
    assert 0 <= traced - real < 0.1 * real  # on meta without gradient, norms take their results' parts one by one
    assert traced < trace.trace_pass(meta, 3, (8, 6), 9)
    assert [name for name, _ in meta.named_modules()] == names


@pytest.mark.parametrize("sample", [False, True])
def test_encoding_a_crop_is_traced_as_it_runs(sample: bool) -> None:
    vae, encode = tiny_vae(), latents_of.posterior if sample else latents_of.encode
    real = alive(lambda: encode(vae, torch.zeros(1, 3, 32, 48)))
    assert real == trace.trace_encode(trace.meta_vae(vae.config), (48, 32), sample=sample)


@pytest.mark.parametrize("side", [64, 112])
def test_decoding_is_traced_as_it_runs_in_tiles_too(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("model.latents", "sample.output"):
        monkeypatch.setattr(f"libreflux.{module}.TILE_ABOVE", 96)
    vae = tiny_vae()
    latents = torch.zeros(1, 16, side // 8, side // 8)
    real = alive(lambda: decoded(vae, latents))
    traced = trace.trace_decode(trace.meta_vae(vae.config), side)
    assert abs(traced - real) < 0.01 * real
    whole = alive(lambda: decoded(vae, latents, tile=False))
    assert traced == whole if side <= 96 else traced < 0.8 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_of_the_text_encoders_is_traced_as_it_runs(tiny_model_dir: Path, dtype: torch.dtype) -> None:
    source = open_model(tiny_model_dir)
    encoders, captions = source.load_text(dtype=dtype), [f"a red apple on blue {number % 10}" for number in range(12)]
    tokens = encoders.count_tokens(captions, max_tokens=512)
    assert len(set(tokens)) == 1
    real = alive(lambda: encoders.encode(captions, padding="drop", max_tokens=512))
    configs = [source.part_config(part) for part in ("text_encoder", "text_encoder_2")]
    clip, t5 = trace.meta_encoders(configs[0], configs[1], dtype)
    assert trace.weights_of(t5) == trace.weights_of(encoders.text_encoder_2)
    traced = trace.trace_text(clip, t5, len(captions), tokens[0])
    assert abs(traced - real) < 0.15 * real


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_text_encoders_are_counted_in_the_precision_that_they_run_in(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captions(**changes: Any) -> phases.Phase:
        recipe = Recipe.model_validate(recipe_tree(tmp_path, **changes))
        [phase] = [each for each in estimate.estimate_recipe(recipe, text_tokens=20).preparing if "T5" in each.name]
        return phase

    on_the_cpu = captions()
    assert "fp32" in on_the_cpu.name
    assert 2 * captions(text_precision="bf16").held == pytest.approx(on_the_cpu.held, rel=0.01)  # but for position ids
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = captions()
    assert card == dataclasses.replace(captions(text_precision="bf16"), libraries=card.libraries)
    assert "bf16" in card.name
    assert card.libraries == phases.libraries(False, card.activations)
    blockwise = captions(text_precision="fp32")
    assert blockwise.held < on_the_cpu.held  # two blocks, of which the card holds one at a time
    for text_precision, told in (("fp32", "fp32"), ("bf16", "bf16")):  # a cache that is begun decides, on a CPU too
        cache = str(tmp_path / f"cache-{told}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        prepare_cache(Recipe.model_validate(recipe_tree(tmp_path, text_precision=text_precision, cache=cache)))
        for has_card in (False, True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda found=has_card: found)
            assert told in captions(cache=cache).name


@pytest.mark.usefixtures("on_a_card")
def test_each_phase_is_there_when_the_recipe_asks_for_it(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def found(**changes: Any) -> phases.Estimate:
        return estimate.estimate_recipe(Recipe.model_validate(recipe_tree(tmp_path, **changes)), text_tokens=20)

    plain = found(samples={"every": 0}, held_out={"share": 0})
    assert [phase.name.split()[0] for phase in plain.phases] == ["preparing", "preparing", "training"]
    prompts = {"every": 1, "prompts": ["a fox"]}
    full = found(samples=prompts, held_out={"share": 0.4})
    drawing, measuring = full.between
    vae = trace.weights_of(tiny_vae())
    assert (drawing.held, measuring.held) == (full.held + vae, full.held)
    assert full.held == full.weights + full.adapter + full.moments
    assert found(samples=prompts, resolution=[16, 64]).between[0].activations > drawing.activations
    # Of several resolutions the held-out pictures are measured at the first, and a batch of them at a time.
    smaller = found(held_out={"share": 0.4}, resolution=[16, 64]).between[-1]
    assert smaller.activations < measuring.activations
    assert found(held_out={"share": 0.4}, batch=4).between[-1].activations > 1.5 * measuring.activations
    online = found(text_cache="none", samples=prompts)
    encoders = next(phase for phase in full.preparing if "T5" in phase.name).held
    assert online.encoders == encoders
    assert online.between[0].held == full.held + vae + encoders


def test_the_largest_crop_is_the_largest_bucket() -> None:
    assert estimate.largest_crop(views(["square"], [512, 1024])) == (1024, 1024)
    width, height = estimate.largest_crop(views(["square", "aspect"], [512, 1024]))
    assert 1024**2 < width * height <= 1.25 * 1024**2

"""The traced estimate against what really lives."""

from __future__ import annotations

import torch
from torch import nn

from libreflux.adapter.files import attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.model.text import TextConditioning
from libreflux.train import estimate
from libreflux.train.objective import flow_matching_loss
from tiny import tiny_transformer


def test_live_bytes_follow_storages_from_birth_to_death() -> None:
    x = torch.empty(1000)
    with estimate.LiveBytes() as live:
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
    with estimate.LiveBytes() as live:
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
    with estimate._attention_in_tiles(), estimate.LiveBytes() as live:
        flow_matching_loss(real, latents, latents, torch.rand(3), text).sum().backward()  # type: ignore[arg-type]
    traced = estimate.trace_pass(meta, 3, (8, 6), 9)  # type: ignore[arg-type]
    assert abs(traced - live.peak) < 0.01 * live.peak
    more = estimate.trace_pass(meta, 6, (8, 6), 9)  # type: ignore[arg-type]
    assert 1.5 * traced < more < 2.1 * traced


def test_flux_in_full_is_estimated_without_its_weights() -> None:
    config = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": False}
    flux = estimate.meta_transformer(config, torch.bfloat16)
    layers = resolve(linear_shapes(flux), [Target(layers="**.attn.**", factor=3)])
    found = estimate.estimate(
        flux, layers, adapter_dtype=torch.bfloat16, batch=1, latent_size=(64, 64), text_tokens=512
    )
    assert abs(found.weights - 2 * 11_891.18e6) < 1e6
    assert found.adapter == 2 * sum(row.parameters for row in layers) and found.moments == 2 * found.adapter
    assert found.gradient == 2 * found.adapter
    # 19 + 38 blocks at 1,536 tokens of 3,072 in bf16, a few dozen such tensors kept by each.
    assert 57 * 10 * 1536 * 3072 * 2 < found.activations < 57 * 40 * 1536 * 3072 * 2
    assert "device memory" in found.table()


def test_8_bit_moments_are_a_quarter_but_for_small_parameters() -> None:
    def found(eight: bool) -> estimate.Estimate:
        flux = estimate.meta_transformer({"num_layers": 1, "num_single_layers": 0}, torch.bfloat16)
        layers = resolve(linear_shapes(flux), [Target(layers="**.attn.to_q", factor=3)])
        return estimate.estimate(
            flux, layers, adapter_dtype=torch.float32, batch=1, latent_size=(8, 8), text_tokens=8, moments_8bit=eight
        )

    wide, narrow = found(False), found(True)
    small, large = 3 * 3, 1024 * 1024  # the two factors of a layer of 3,072 x 3,072
    assert wide.moments == 2 * 4 * (small + large)
    assert narrow.moments == 2 * (4 * small + large + 4 * large // 256)
    assert narrow.adapter == wide.adapter and wide.checkpoint - narrow.checkpoint == wide.moments - narrow.moments


def test_the_total_is_what_lives_at_the_peak() -> None:
    parts = {"weights": 1000, "adapter": 200, "moments": 400, "gradient": 30, "update": 7, "averages": 5000}
    cuda = estimate.Estimate(on_cpu=False, activations=100, checkpoint=1, **parts)
    assert (cuda.process, cuda.total) == (0, 1730)
    cpu = estimate.Estimate(on_cpu=True, activations=100, checkpoint=1, **parts)
    assert (cpu.process, cpu.total) == (72 * 2**20 + 60, 6790 + 72 * 2**20)
    assert estimate.Estimate(on_cpu=False, activations=3, checkpoint=1, **parts).total == 1637

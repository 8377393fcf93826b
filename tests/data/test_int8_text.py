"""Captions in 8 bits: what is lost is bounded, outlier channels do not cost the others, and caches are not confused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from caching import prepare
from libreflux.data import forecast
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.int8_text import GROUP, dequantise, quantise, token_bytes
from libreflux.data.sources import Sample
from libreflux.errors import DataError, ModelError
from libreflux.recipe import DataSource

Prepared = tuple[Cache, list[tuple[DataSource, list[Sample]]]]


def _spread(scales: Tensor, width: int) -> Tensor:
    return scales.float().repeat_interleave(GROUP, dim=1)[:, :width]


@pytest.mark.parametrize("width", [24, 64, 100, 4096])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 3e4])
def test_the_error_is_at_most_half_a_scale(width: int, magnitude: float) -> None:
    tokens = magnitude * torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    tokens[:, 7] *= 50
    tokens[3] = 0
    values, scales = quantise(tokens)
    assert (values.dtype, scales.dtype, values.shape) == (torch.int8, torch.bfloat16, tokens.shape)
    assert values.nbytes + scales.nbytes == 50 * token_bytes(width)
    spread = _spread(scales, width)
    assert ((values.float() * spread - tokens).abs() <= 0.5001 * spread).all()
    assert int(values.abs().max()) == 127  # the whole range is used, and nothing is clipped beyond the bound
    found = dequantise(values, scales)
    assert found.dtype == torch.bfloat16
    assert not found[3].any()
    assert ((found.float() - tokens).abs() <= 0.5001 * spread + 2**-8 * tokens.abs()).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_not_stored_as_some_number(bad: float) -> None:
    tokens = torch.ones(3, 128)
    tokens[1, 70] = bad
    with pytest.raises(ModelError, match="not finite"):
        quantise(tokens)


def _one_scale_per_token(tokens: Tensor) -> Tensor:
    scale = tokens.abs().amax(dim=1, keepdim=True) / 127
    return (tokens / scale).round() * scale


def test_outlier_channels_do_not_cost_the_others() -> None:
    tokens = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    outliers = torch.zeros(4096, dtype=torch.bool)
    outliers[[5, 700, 2100, 4000]] = True
    tokens[:, outliers] *= 30

    def lost(found: Tensor) -> float:
        return float((found.float() - tokens)[:, ~outliers].norm() / tokens[:, ~outliers].norm())

    assert lost(dequantise(*quantise(tokens))) < 0.02
    assert lost(_one_scale_per_token(tokens)) > 0.1


def test_a_cache_in_int8_reads_back_its_captions_and_takes_no_others(
    tmp_path: Path, prepared: Prepared, tiny_model_dir: Path, pictures: Path
) -> None:
    full, [(_, samples)] = prepared

    def run(text_cache: Literal["bf16", "int8", "none"]) -> Cache:
        source = DataSource(path=str(pictures), crops_per_picture=2)
        views = [View("square", 32)]
        return prepare(
            str(tiny_model_dir),
            [source],
            views=views,
            text_padding="drop",
            out=tmp_path / "cache",
            text_cache=text_cache,
        )[0]

    cache = run("int8")
    captions = ["", *sorted({caption for sample in samples for caption in sample.captions})]
    found, wanted = cache.text(captions), full.text(captions)
    assert found.lengths == wanted.lengths
    assert torch.equal(found.pooled, wanted.pooled)
    for own, other in zip(found.tokens, wanted.tokens, strict=True):
        assert own.dtype == torch.bfloat16
        assert 0 < float((own.float() - other.float()).norm() / other.float().norm()) < 0.01
    stored: dict[str, int] = {}
    shards = list(cache.folder.glob("shards/texts-*"))
    for path in shards:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = name.partition("/")[0]
                stored[part] = stored.get(part, 0) + file.get_tensor(name).nbytes
    assert stored["tokens"] + stored["scales"] == sum(found.lengths) * token_bytes(24)
    _, text = forecast.needed_bytes(tiny_model_dir, [], captions, 512, "int8")
    assert 0.7 < text / sum(path.stat().st_size for path in shards) < 1.5
    with pytest.raises(DataError, match="text int8, now bfloat16; hint: use another cache folder"):
        run("bf16")
    with pytest.raises(DataError, match="text int8, now bfloat16"):
        run("none")
    assert run("int8").text(captions).lengths == found.lengths


def test_a_disk_too_small_for_text_is_told_of_8_bits(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    for text_cache, hint in (("bf16", "or use text_cache: int8 or none"), ("int8", "or use text_cache: none")):
        with pytest.raises(DataError, match=hint):
            forecast.check_disk(tiny_model_dir, tmp_path, [], ["a fox"] * 9, 512, text_cache)
    bf16, int8 = (forecast.needed_bytes(tmp_path, [], ["x" * 600] * 9, 512, kind)[1] for kind in ("bf16", "int8"))
    assert 0.5 < int8 / bf16 < 0.53  # T5-XXL's width

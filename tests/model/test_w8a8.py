"""W8A8 products beside their plain twin in fp64, their error, their gradient; which layers take part."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from libreflux.adapter.adapter import attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.model import w8a8
from libreflux.model.int8 import Int8Linear, dense_weight, quantise, quantise_model
from libreflux.model.numerics import enable_checkpointing
from libreflux.model.w8a8 import Kind, plain_product, quantise_activations, quantise_rows, scaled_product
from model.random_inputs import run
from tiny import tiny_transformer

KINDS: tuple[Kind, ...] = ("int8", "fp8")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def operands(rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + k + n)
    x = torch.randn(rows, k, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
    matrix = torch.randint(-127, 128, (k, n), generator=generator, dtype=torch.int8)
    after, before = torch.rand(n, generator=generator) + 0.1, torch.rand(k, generator=generator) + 0.1
    return x.to(dtype), matrix, after, before, torch.randn(n, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("size", [(1, 64, 32), (5, 48, 80), (70, 301, 77), (9, 7, 1)])
def test_a_product_is_its_plain_twin(size: tuple[int, int, int], dtype: torch.dtype, kind: Kind) -> None:
    """Of both layouts of the matrix, with each of the vectors and without; int8 sums are exact."""
    x, matrix, after, before, bias = operands(*size, dtype)
    transposed = matrix.T.contiguous().T
    rows: list[dict[str, Any]] = [
        {"after": after, "bias": bias},
        {"after": after, "bias": None},
        {"after": None, "bias": None, "before": before},
    ]
    for options in rows:
        wanted = plain_product(x, matrix, kind=kind, **options)
        for layout in (matrix, transposed):
            found = scaled_product(x, layout, kind=kind, **options)
            assert found.dtype == dtype
            assert error(found, wanted) <= ROUNDING[dtype]


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_the_cpus_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    x, matrix, after, before, bias = operands(30, 96, 64, torch.bfloat16)
    monkeypatch.setattr(w8a8, "_AT_ONCE", at_once)
    for options in ({"after": after, "bias": bias}, {"after": None, "bias": None, "before": before}):
        found = scaled_product(x, matrix, kind="int8", **options)
        whole = w8a8._at_once(x, matrix, options["after"], options["bias"], "int8", options.get("before"))
        assert found.equal(whole)


def test_rows_are_off_by_no_more_than_half_a_step_and_zeros_stay() -> None:
    x = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    x[7] = 0
    q, scale = quantise_rows(x, "int8")
    assert q.abs().amax(dim=1).float().tolist() == [127.0] * 7 + [0.0] + [127.0] * 42
    assert ((x - scale * q).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert scaled_product(x, torch.ones(64, 3, dtype=torch.int8), None, None, "int8")[7].tolist() == [0.0] * 3


def test_fp8_rows_are_e4m3_numbers_by_a_power_of_a_row() -> None:
    x = torch.randn(50, 64)
    q, scale = quantise_rows(x, "fp8")
    assert q.dtype == torch.float8_e4m3fn
    assert float((q.float() * scale - x).norm() / x.norm()) < 0.03
    assert q.float().abs().amax(dim=1).tolist() == [448.0] * 50


def test_what_is_not_finite_stays_so() -> None:
    """A NaN that became a number would be trained on."""
    x, matrix, after, _, bias = operands(6, 64, 32, torch.bfloat16)
    x[2, 5], x[4, 1] = float("nan"), float("inf")
    for kind in KINDS:
        found = scaled_product(x, matrix, after, bias, kind)
        assert found.isfinite().all(dim=1).tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.05)])
def test_forward_and_gradient_are_near_those_of_the_weights(kind: Kind, bound: float) -> None:
    torch.manual_seed(0)
    layer = quantise(nn.Linear(192, 256))
    dense = nn.functional.linear
    x = torch.randn(3, 40, 192, requires_grad=True)
    upstream = torch.randn(3, 40, 256)
    wanted = dense(x, dense_weight(layer), layer.bias)
    (by_x,) = torch.autograd.grad(wanted, x, upstream)
    holder = nn.Module()
    holder.layer = layer
    assert quantise_activations(holder, kind) == ["layer"]
    found = layer(x)
    (found_by_x,) = torch.autograd.grad(found, x, upstream)
    assert 1e-4 < error(found, wanted) < bound
    assert 1e-4 < error(found_by_x, by_x) < bound


def test_a_row_of_outliers_costs_its_own_row_alone() -> None:
    """Scales are per token: one token that is a hundred times larger leaves the others their precision."""
    x, matrix, after, _, _ = operands(20, 64, 32, torch.float32)
    before = scaled_product(x, matrix, after, None, "int8")
    x[3] *= 100
    assert scaled_product(x, matrix, after, None, "int8")[[0, 1, 2, 4]].equal(before[[0, 1, 2, 4]])


def test_which_layers_take_part() -> None:
    """All int8 linears but the AdaLN ones, and back again."""
    transformer = tiny_transformer().requires_grad_(False)
    quantise_model(transformer)
    names = quantise_activations(transformer, "int8")
    others = {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, Int8Linear) and module.multiply is None
    }
    assert others == {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "single_transformer_blocks.1.norm.linear",
    }
    assert "single_transformer_blocks.1.proj_out" in names
    plain = copy.deepcopy(transformer)
    assert quantise_activations(plain, None) == names
    with torch.no_grad():
        assert 1e-4 < error(run(transformer), run(plain)) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_on_it_under_checkpointing(kind: Kind) -> None:
    """Gradients near those of the weight-only base; the base has none."""
    found = []
    for chosen in (None, kind):
        transformer = tiny_transformer().requires_grad_(False)
        quantise_model(transformer)
        quantise_activations(transformer, chosen)
        enable_checkpointing(transformer.train())
        rows = resolve(linear_shapes(transformer), [Target(layers="**.attn.**", factor=2)])
        adapter = attach(transformer, rows, init="kaiming")
        run(transformer).square().mean().backward()
        found.append(torch.cat([one.grad.flatten() for one in adapter.parameters() if one.grad is not None]))
        assert len(found[-1]) == sum(one.numel() for one in adapter.parameters())
    assert 1e-4 < error(found[1], found[0]) < 0.2


def test_which_kind_a_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert w8a8.kind_for("cpu") == "int8"
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, kind in (((8, 0), "int8"), ((8, 9), "int8"), ((9, 0), "fp8"), ((12, 0), "fp8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert w8a8.kind_for("cuda") == kind


WRONG = """
from libreflux.model import w8a8
try:
    w8a8.kind_for("cpu")
except Exception as error:
    print(error)
"""


def test_a_cpu_that_multiplies_wrongly_is_refused() -> None:
    """oneDNN without VNNI sums pairs of products in 16 bits. A CPU without VNNI is refused anyway."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, env=environment, check=True)
    told = "w8a8: this CPU multiplies int8 by int8 wrongly, as CPUs without VNNI do; hint: use int8, which multiplies"
    assert not done.stdout or done.stdout.startswith(told)
    if "avx512_vnni" in Path("/proc/cpuinfo").read_text():
        assert done.stdout


def test_torchs_default_dtype_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries change it for the whole process while they load a model, in another thread perhaps."""
    x, matrix, after, before, bias = operands(30, 96, 64, torch.float32)
    rows: list[dict[str, Any]] = [{"after": after, "bias": bias}, {"after": None, "bias": None, "before": before}]
    for options in rows:
        wanted = scaled_product(x, matrix, kind="int8", **options)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert scaled_product(x, matrix, kind="int8", **options).equal(wanted)
        finally:
            torch.set_default_dtype(torch.float32)

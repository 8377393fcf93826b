"""Blocks compiled by kind: the same velocity and gradients, one graph a kind, errors where torch would give up."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.adapter import plan
from libreflux.adapter.adapter import Adapter
from libreflux.errors import ModelError, RunError
from libreflux.model import compiling, numerics
from libreflux.model.compiling import CompiledBlocks, explained, missing_compiler, work_of
from libreflux.model.int8 import quantise_model
from libreflux.model.latents import image_ids
from libreflux.model.offload import blocks_of
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.recipe import AdapterSpec
from tiny import tiny_transformer

CAPTURED = "aot_eager"  # captures all, as the real one does, and computes as without


def adapted(kind: str = "lokr", layers: str = "**.attn.to_q") -> tuple[FluxTransformer2DModel, Adapter]:
    """The tiny transformer in int8 with an adapter in both kinds of block, gradient checkpointing on."""
    transformer = tiny_transformer(seed=3).requires_grad_(False)
    quantise_model(transformer)
    size = {"factor": 3} if kind == "lokr" else {}
    init = {"init": "perturbed"} if kind == "lokr" else {"rank": 2}
    spec = AdapterSpec.model_validate({"kind": kind, "targets": [{"layers": layers, **size}], **init})
    adapter = plan.build(spec, transformer, plan.plan(spec, transformer).layers, dtype=torch.float32, seed=0)
    numerics.enable_checkpointing(transformer)
    return transformer.train(), adapter


def predicted(transformer: FluxTransformer2DModel, *lengths: int, side: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    texts = [torch.randn(length, 24, generator=generator) for length in lengths]
    text = TextConditioning(texts, torch.randn(len(lengths), 16, generator=generator))
    ids = image_ids(side, side)
    packed = torch.randn(len(lengths), len(ids), 64, generator=generator)
    return velocity(transformer, packed, torch.full((len(lengths),), 0.4), text, ids)


def gradients(transformer: FluxTransformer2DModel, adapter: Adapter, *lengths: int, side: int = 6) -> list[Tensor]:
    parameters = list(adapter.parameters())
    return list(torch.autograd.grad(predicted(transformer, *lengths, side=side).square().mean(), parameters))


def test_lengths_and_sizes_share_a_graph_for_each_kind() -> None:
    transformer, adapter = adapted()
    twin, twins = adapted()
    names, keys = [name for name, _ in transformer.named_modules()], list(transformer.state_dict())
    compiled = CompiledBlocks(transformer, backend=CAPTURED)
    for lengths, side in (((7,), 6), ((20,), 6), ((11,), 8)):
        found = gradients(transformer, adapter, *lengths, side=side)
        wanted = gradients(twin, twins, *lengths, side=side)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
        assert compiled.graphs == 2, compiled.graphs_by_kind
    assert compiled.graphs_by_kind == {"FluxTransformerBlock 1": 1, "FluxSingleTransformerBlock 2": 1}
    assert compiled.kinds == 2
    assert work_of(twin, 5, training=True).kinds == 2
    assert ([name for name, _ in transformer.named_modules()], list(transformer.state_dict())) == (names, keys)
    assert (compiled.news() or "").startswith("compiled 2 kinds of block in ")
    assert compiled.news() is None


def test_one_graph_more_with_a_mask_and_without_the_adapter() -> None:
    transformer, adapter = adapted("lora", "single_transformer_blocks.*.attn.to_q")
    compiled = CompiledBlocks(transformer, backend=CAPTURED)
    blocks = transformer.transformer_blocks
    transformer.transformer_blocks = torch.nn.ModuleList()  # half the time to compile
    try:
        with torch.no_grad():
            on, plain = predicted(transformer, 5, 9), compiled.graphs
            torch.testing.assert_close(predicted(transformer, 3, 8, 4), _plainly(compiled, transformer, 3, 8, 4))
            assert (plain, compiled.graphs) == (1, 1)  # one for both numbers of samples
            with adapter.disabled():
                off = predicted(transformer, 5, 9)
            assert compiled.graphs == 2
            torch.testing.assert_close(predicted(transformer, 5, 9), on)
            assert compiled.graphs == 2
    finally:
        transformer.transformer_blocks = blocks
    assert torch.equal(on, off)  # a LoRA begins with nothing


def _plainly(compiled: CompiledBlocks, transformer: FluxTransformer2DModel, *lengths: int) -> Tensor:
    before = compiled.graphs
    with compiled.paused():
        found = predicted(transformer, *lengths)
    assert compiled.graphs == before
    return found


def test_torchs_limit_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = tiny_transformer().requires_grad_(False)
    transformer.transformer_blocks = torch.nn.ModuleList()
    CompiledBlocks(transformer, backend=CAPTURED)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        predicted(transformer, 5)
        transformer.single_transformer_blocks[0].norm.norm.eps = 1e-3  # what a graph holds as a constant
        with pytest.raises(RunError, match=r"FluxSingleTransformerBlock 1: compiled 1 times.*set `compile` off"):
            predicted(transformer, 5)


def test_a_compiler_that_is_turned_off_is_an_error() -> None:
    transformer = tiny_transformer().requires_grad_(False)
    CompiledBlocks(transformer, backend=CAPTURED)
    turned_off = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), turned_off, pytest.raises(RunError, match="turned off in this process"):
        predicted(transformer, 5)


def test_a_compiler_that_fails_in_the_backward_pass_is_one_line() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.exc import InductorError

    def failing(graph: object, inputs: object) -> object:
        raise InductorError(RuntimeError("C++ compile error\nwith much below"), None)

    name = "fails_in_backward"
    torch._dynamo.register_backend(aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=failing), name=name)
    transformer, adapter = adapted()
    CompiledBlocks(transformer, backend=name)
    with (
        pytest.raises(
            ModelError, match=r"^backward: cannot be compiled by torch .*: RuntimeError: C\+\+ compile error;"
        ),
        explained("backward"),
    ):
        gradients(transformer, adapter, 7)


def test_blocks_do_not_hold_themselves() -> None:
    import gc
    import weakref

    transformer = tiny_transformer()
    compiled = CompiledBlocks(transformer, backend=CAPTURED)
    block = weakref.ref(transformer.transformer_blocks[0])
    gc.disable()
    try:
        del transformer
        assert block() is None
    finally:
        gc.enable()
    del compiled


def test_a_copy_computes_with_its_own_weights() -> None:
    transformer = tiny_transformer().requires_grad_(False)
    compiled = CompiledBlocks(transformer, backend=CAPTURED)
    other = copy.deepcopy(transformer)
    with torch.no_grad(), compiled.paused():
        before = predicted(transformer, 5)
        assert torch.equal(predicted(other, 5), before)
        for block in blocks_of(other):
            block.get_submodule("attn.to_q").get_parameter("weight").mul_(-1)
        assert torch.equal(predicted(transformer, 5), before)
        assert not torch.equal(predicted(other, 5), before)


def test_kinds_are_blocks_of_one_structure() -> None:
    transformer, _ = adapted("lora", "single_transformer_blocks.0.attn.to_q")
    assert (
        CompiledBlocks(transformer, backend=CAPTURED).kinds == 3
    )  # a double one, and the single ones with and without


def test_what_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_compiler("mps") == "compiling for mps is not supported"
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert "no C++ compiler" in str(missing_compiler("cpu"))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "no Triton" in str(missing_compiler("cuda"))

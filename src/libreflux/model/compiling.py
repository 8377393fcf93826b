"""Blocks compiled by kind: the host then starts some tens of kernels for a block, where it starts hundreds otherwise.

What is compiled is a block's forward pass alone (and with it its backward pass), whole. The model's module tree, names
and state dict stay as they are; what hangs on a block (hooks, gradient checkpointing) goes on around it.

Blocks of one class whose modules and shapes agree share one function for each way to call it: with gradients or
without, one sample or several, one text token or several, with a mask or without. torch would compile each of these
anew anyway, since it treats a size of 1 as a constant; a function of its own for each makes one graph of each, and a
graph that is not expected becomes visible. The numbers of samples, text tokens and image tokens are dynamic in all.

Compiled results differ from plain ones in their last bits: sums are fused and rounded less often. Two processes have
the same bits: what torch would choose by timing is turned off.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.errors import ModelError, OptionHint, RunError
from libreflux.model.compile_choice import Work
from libreflux.model.offload import blocks_of
from libreflux.printing import counted

WITHOUT = OptionHint("set `compile` off")
# torch's compiler must not time kernels against one another: the quickest may be another one in the next process.
_PINNED = {
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "shape_padding": False,
    "deterministic": True,
}
_numbers = itertools.count()


class CompiledBlocks:
    """The blocks of a transformer, compiled when they are first called.

    Args:
        transformer: FLUX's, with everything attached that is to be compiled with it.
        backend: torch's compiler; "aot_eager" captures all and fuses nothing, for tests.

    Attributes:
        kinds: kinds of block, those of one class with other shapes or adapters counted apart.
        graphs: compilations so far; each has its backward pass, if any, with it.
        seconds: that they took, each with the first run of its block.
        graphs_by_kind: name of the kind and number -> graphs.
    """

    def __init__(self, transformer: FluxTransformer2DModel, *, backend: str = "inductor") -> None:
        self.backend, self.graphs, self.seconds, self._told = backend, 0, 0.0, 0
        self.graphs_by_kind: dict[str, int] = {}
        self._paused = False
        kinds: dict[Hashable, _Kind] = {}
        for block in blocks_of(transformer):
            structure = _structure(block)
            if structure not in kinds:
                kinds[structure] = _Kind(self, block, f"{type(block).__name__} {len(kinds) + 1}")
            block.forward = _Forward(block, kinds[structure])
        self.kinds = len(kinds)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block the transformer computes as if it were not compiled: for the few passes of a picture."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def news(self) -> str | None:
        """A line of what was compiled since the last call of this; None where nothing was."""
        if self.graphs == self._told:
            return None
        self._told = self.graphs
        kinds = counted(len(self.graphs_by_kind), "kind of block", "kinds of block")
        return f"compiled {kinds} in {self.seconds:.0f} s ({counted(self.graphs, 'graph')} so far)"

    def _add(self, kind: str, graphs: int, seconds: float) -> None:
        self.graphs += graphs
        self.seconds += seconds
        self.graphs_by_kind[kind] = self.graphs_by_kind.get(kind, 0) + graphs


class _Kind:
    """What blocks of one structure share: a compiled function for each way to call them."""

    def __init__(self, owner: CompiledBlocks, block: nn.Module, name: str) -> None:
        self.owner, self.block, self.name = owner, type(block), name
        self.trains = any(parameter.requires_grad for parameter in block.parameters())
        self.functions: dict[Hashable, Callable[..., tuple[Tensor, Tensor]]] = {}

    def call(
        self,
        block: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block's forward pass; arguments and results are those of diffusers' block."""
        owner = self.owner
        if owner._paused:
            plain: tuple[Tensor, Tensor] = self.block.forward(
                block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            return plain
        mask = (joint_attention_kwargs or {}).get("attention_mask")
        graded = torch.is_grad_enabled()
        if graded and self.trains:
            # The first block's inputs have no gradient, those of all others have: it would be a graph of its own.
            hidden_states, encoder_hidden_states = _with_grad(hidden_states), _with_grad(encoder_hidden_states)
        samples, words = hidden_states.shape[0], encoder_hidden_states.shape[1]
        way = graded, samples > 1, words > 1, mask is not None
        new = way not in self.functions
        if new:
            self.functions[way] = _compiled(self.block.forward, owner.backend)
        _mark(hidden_states, 0, 1)
        _mark(encoder_hidden_states, 0, 1)
        _mark(temb, 0)
        _mark(mask, 0, 3)
        for table in image_rotary_emb:
            _mark(table, 0)
        before, began = _graphs(), time.perf_counter()
        with explained(self.name):
            out = self.functions[way](
                block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        if made := _graphs() - before:
            owner._add(self.name, made, time.perf_counter() - began)
        elif new:
            hint = OptionHint("leave out TORCHDYNAMO_DISABLE and torch.compiler.set_stance, or set `compile` off")
            raise RunError("torch's compiler is turned off in this process", where=self.name, hint=hint)
        return out


class _Forward:
    """In the place of a block's `forward`; a deep copy of the block calls itself, and shares what was compiled."""

    def __init__(self, block: nn.Module, kind: _Kind) -> None:
        self.block = weakref.ref(block)  # a block that held itself would keep its gigabytes until a garbage collection
        self.kind = kind

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        block = self.block()
        assert block is not None
        return self.kind.call(block, *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        block = self.block()
        assert block is not None
        return _Forward(memo.get(id(block), block), self.kind)


def is_compiled(block: nn.Module) -> bool:
    """Whether a block is one of `CompiledBlocks`."""
    return isinstance(vars(block).get("forward"), _Forward)


def missing_compiler(device: torch.device | str) -> str | None:
    """Why torch cannot compile for a device here; None: it can."""
    kind = torch.device(device).type
    if kind == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "there is no Triton, with which torch compiles for a card"
        compilers = [os.environ["CC"]] if os.environ.get("CC") else ["clang", "gcc"]
        here = any(shutil.which(name) for name in compilers)
        return None if here else "there is no C compiler (gcc, clang or CC), which Triton needs"
    if kind != "cpu":
        return f"compiling for {kind} is not supported"

    from torch._inductor import cpp_builder, exc

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        compiler = None
    found = compiler is not None and shutil.which(compiler) is not None
    return None if found else "there is no C++ compiler (g++, clang++ or CXX), with which torch compiles for a CPU"


def work_of(transformer: FluxTransformer2DModel, passes: int, *, training: bool) -> Work:
    """What `compile_choice.choose` asks for, of so many passes through a transformer with its adapters."""
    return Work(kinds=kinds_of(transformer), blocks=len(blocks_of(transformer)), passes=passes, training=training)


def kinds_of(transformer: FluxTransformer2DModel) -> int:
    """How many kinds of block a transformer has, with what is attached to it."""
    return len({_structure(block) for block in blocks_of(transformer)})


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiles whole or not at all; torch then raises where it would otherwise go on uncompiled."""

    def block_forward(block: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
        text, image = forward(block, *args)
        # A single block returns views of one tensor, a double one whole tensors: the next block would have two graphs.
        return text.clone(memory_format=torch.contiguous_format), image.clone(memory_format=torch.contiguous_format)

    # torch keeps what it compiled with the code object, and what it knows of sizes by the code's name.
    code = block_forward.__code__.replace(co_name=f"block_forward_{next(_numbers)}")
    own = types.FunctionType(code, block_forward.__globals__, code.co_name, None, block_forward.__closure__)
    options: dict[str, str | int | bool | Callable[..., Any]] | None = None
    if backend == "inductor":
        from torch._inductor import config

        options = {name: value for name, value in _PINNED.items() if hasattr(config, name)}
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(
        own, fullgraph=True, backend=backend, options=options
    )
    return compiled


def _structure(block: nn.Module) -> Hashable:
    """What decides a block's graph: its modules, and the shape and dtype of each tensor in it."""
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    return (
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors),
    )


def _with_grad(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _mark(tensor: Tensor | None, *dims: int) -> None:
    """Says that these sizes vary, from the first call on; a size of 1 is a constant to torch whatever is said.

    "Maybe", since the compiler makes a constant of a size that it finds equal to another by chance, such as four tokens
    beside a factor of four: that is one graph more, where `mark_dynamic` would end the run.
    """
    if tensor is not None:
        for dim in dims:
            if tensor.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns what torch's compiler raises in the block into one line; it compiles backward passes in their first run.

    Raises:
        RunError: torch's limit of compilations was reached.
        ModelError: something cannot be compiled.
    """
    from torch._dynamo import exc

    try:
        yield
    except exc.FailOnRecompileLimitHit as error:
        limit = torch._dynamo.config.recompile_limit
        what = f"compiled {limit} times, and would have to be once more: something varies from call to call"
        raise RunError(what, where=where, hint=WITHOUT) from error
    except exc.TorchDynamoException as error:
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"cannot be compiled by torch {torch.__version__}: {told}", where=where, hint=WITHOUT
        ) from error

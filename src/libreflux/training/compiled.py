"""Whether a run's blocks are compiled, and the passes in it that are not."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from libreflux.errors import LibrefluxError, RunError
from libreflux.model import compile_choice
from libreflux.model.compiling import CompiledBlocks, explained, kinds_of, missing_compiler
from libreflux.model.offload import blocks_of
from libreflux.recipe import Recipe
from libreflux.training.adversary import spec_of
from libreflux.training.callbacks import Callbacks
from libreflux.training.checkpoint import Checkpoint, listed
from libreflux.training.flow_objective import extra_passes, second_passes

COMPILED = "compiled"
"""In a checkpoint's state.json where blocks were compiled; left out where not, as versions did that knew no such."""


def require_compiler(recipe: Recipe, device: str) -> None:
    """Before anything is read: raises RunError where `compile: on` cannot be done."""
    if recipe.compile == "on" and (missing := missing_compiler(device)) is not None:
        raise RunError(missing, where="compile", hint="set compile: off")


def compiled_blocks(
    recipe: Recipe,
    transformer: FluxTransformer2DModel,
    device: str,
    newest: Checkpoint | None,
    callbacks: Callbacks,
) -> CompiledBlocks | None:
    """The blocks compiled, if that is asked for or pays; a resumed run's as they were.

    Args:
        recipe: the run's.
        transformer: with its adapter.
        device: where it computes.
        newest: the checkpoint that the run goes on from; None at the start.
        callbacks: told what was decided.

    Raises:
        RunError: `compile: on`, and torch cannot compile here.
    """
    if recipe.compile == "off":
        return None
    before, kind = _before(newest, device), torch.device(device).type
    asked = recipe.compile == "on" or before or (kind == "cuda" and before is None)
    missing = missing_compiler(device) if asked else None
    work = _work(recipe, kinds_of(transformer), len(blocks_of(transformer)))
    choice = compile_choice.choose(recipe.compile, kind, work, missing=missing, before=before)
    if choice.told is not None:
        callbacks.on_notice(choice.told)
    return CompiledBlocks(transformer) if choice.on else None


def is_here(device: str) -> bool:
    """Whether this machine has a device of this type."""
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def planned_line(recipe: Recipe, kinds: int, blocks: int, device: str) -> str | None:
    """What would be said of it when the run starts, for a dry run; None: nothing, or `compile: on` is refused here.

    Args:
        recipe: the run's.
        kinds: of block, see `CompiledBlocks`.
        blocks: of the transformer.
        device: type of the device that would train; one that is not here is taken to have a compiler.
    """
    work = _work(recipe, kinds, blocks)
    missing = missing_compiler(device) if is_here(device) else None
    if recipe.compile == "on" and missing is not None:
        return None
    return compile_choice.choose(recipe.compile, device, work, missing=missing, before=_last_kept(recipe, device)).told


def _work(recipe: Recipe, kinds: int, blocks: int) -> compile_choice.Work:
    """Through the transformer; with an adversary the student's and two of the teacher's, one without backward.

    The passes of `guided_target` and `hold_base` have graphs of their own, and gain little: they count by those alone.
    """
    passes = recipe.steps * recipe.accumulate * (1 if spec_of(recipe) is None else 3)
    own = len(extra_passes(recipe)) + (second_passes(recipe) > 0)
    graphs = compile_choice.GRAPHS_A_KIND * (1 + own)
    return compile_choice.Work(kinds=kinds, blocks=blocks, passes=passes, training=True, graphs=graphs)


def _last_kept(recipe: Recipe, device: str) -> bool | None:
    """What the run has decided so far, by the newest checkpoint that can be read; see `_before`."""
    for newest in reversed(listed(Path(recipe.out))):
        with contextlib.suppress(OSError, ValueError, LibrefluxError):  # damaged, or pruned by a run that goes on
            return _before(newest, device)
    return None


def errors_of(compiled: CompiledBlocks | None) -> AbstractContextManager[None]:
    """Around a step: what torch's compiler raises in it, in one line."""
    return contextlib.nullcontext() if compiled is None else explained("the backward pass of a block")


def uncompiled(compiled: CompiledBlocks | None) -> AbstractContextManager[None]:
    """Sample pictures and held-out ones are few passes, which would need graphs of their own."""
    return contextlib.nullcontext() if compiled is None else compiled.paused()


def _before(newest: Checkpoint | None, device: str) -> bool | None:
    """What was decided for the run that goes on; None at the start, and on another kind of device."""
    if newest is None:
        return None
    state = newest.state()
    kind = str(state.get("device", "")).partition(" ")[0].partition(":")[0]
    return bool(state.get(COMPILED)) if kind == torch.device(device).type else None

"""Whether blocks are compiled: decided once, before the work, from what it would cost and save. Loads no torch.

The numbers are one H200's, with torch 2.11 and FLUX.1's 57 blocks: a training pass in int8 at 1024 px fell from 1.146
to 0.741 s, one at 512 px from 1.033 to 0.403 s. Compiling itself and compiled drawing have not been measured there: the
other numbers are guesses that err on the side of not compiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from libreflux.errors import OptionHint, RunError
from libreflux.printing import counted

Compile = Literal["auto", "on", "off"]
"""Whether a transformer's blocks are compiled by kind; "auto": where it saves more time than it takes."""

SECONDS_A_GRAPH = 30.0
GRAPHS_A_KIND = 2  # prompts of one token, which empty ones are, have a graph of their own
SAVED_IN_TRAINING = 0.007  # seconds a block and pass, forward and backward
SAVED_IN_DRAWING = 0.001  # seconds a block and pass


@dataclass(frozen=True)
class CompileChoice:
    """The decision.

    Attributes:
        on: whether blocks are compiled.
        told: a line for the user; None where nothing is to be said.
    """

    on: bool
    told: str | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run or some pictures are, as far as it counts here.

    Attributes:
        kinds: kinds of block, see `CompiledBlocks`.
        blocks: of the transformer.
        passes: through it, over all steps and pictures.
        training: whether each pass has a backward pass.
        graphs: of each kind.
    """

    kinds: int
    blocks: int
    passes: int
    training: bool
    graphs: int = GRAPHS_A_KIND

    @property
    def seconds(self) -> float:
        """That compiling is expected to take."""
        return SECONDS_A_GRAPH * self.graphs * self.kinds

    @property
    def saved(self) -> float:
        """Seconds that all passes together are expected to take less."""
        return (SAVED_IN_TRAINING if self.training else SAVED_IN_DRAWING) * self.blocks * self.passes


def choose(
    asked: Compile, device: str, work: Work, *, missing: str | None = None, before: bool | None = None
) -> CompileChoice:
    """Whether blocks are compiled.

    Args:
        asked: by the user.
        device: type of the device, e.g. "cuda".
        work: what is to be done.
        missing: why torch cannot compile here, see `compiling.missing_compiler`; None: it can.
        before: the decision under which this run or picture was begun, which "auto" keeps; None: there is none.

    Raises:
        RunError: asked for, and torch cannot compile here.
    """
    if asked == "off":
        return CompileChoice(False)
    if asked == "on":
        if missing is not None:
            raise RunError(missing, where="compile", hint=OptionHint("set `compile` off"))
        return CompileChoice(True, f"blocks are compiled: {counted(work.kinds, 'kind')}, at their first calls")
    pays = device == "cuda" and work.saved > work.seconds
    if missing is not None:
        return CompileChoice(False, f"blocks are not compiled: {missing}" if before or pays else None)
    if before is not None:
        told = f"blocks are {'' if before else 'not '}compiled, as they were before"
        return CompileChoice(before, told if before or pays else None)
    if device != "cuda":
        return CompileChoice(False)
    passes = counted(work.passes, "pass", "passes")
    balance = f"about {work.seconds:,.0f} s to compile, and {work.saved:,.0f} s saved in {passes}"
    return CompileChoice(pays, f"blocks are {'' if pays else 'not '}compiled: {balance} (estimated)")

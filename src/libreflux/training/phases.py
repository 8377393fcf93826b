"""The phases of a run with the memory that each takes, and the table that tells them.

What is told is the largest of preparing, training, drawing samples and measuring held-out pictures: they come one after
the other, and a run needs as much as its largest phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from libreflux.model import offload

MIB = 2**20
# What a CPU process holds besides tensors; measured, see docs/log.md (the memory estimate, second and third time).
CPU_KERNELS = 72 * MIB  # compiled kernels and scratch that torch and oneDNN keep, the same for every model
HEAP_HOLES = 0.6  # of the activations: glibc's heap cannot give a freed aligned block to another of the same size
# What a card holds besides the tensors that are traced: workspaces of cuBLAS and of the attention kernels, and what the
# allocator rounds up. The line through two runs on an H200 (torch 2.11, FLUX.1's size, 24 pictures at 1024 px, captions
# of 50 tokens): flux-24gb-free trained at a peak of 19.70 GiB, of which 19.16 GiB are traced, 2.36 GiB of them
# activations; flux-24gb-style prepared, with T5-XXL in fp32, at 18.4 GiB, of which 18.27 GiB and 0.07 GiB.
CARD_WORKSPACES = 116 * MIB
CARD_ROUNDING = 0.18  # of the activations
# Of the same run of flux-24gb-free: 22.6 GiB were reserved by torch's allocator for 19.70 GiB that were allocated.
CARD_RESERVE = 22.6 / 19.70


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a run at its peak, in bytes.

    Attributes:
        name: what is done.
        held: weights, and whatever else stays in memory through the phase.
        activations: the most that a pass has alive beside that.
        libraries: what is held besides tensors, see `libraries`.
    """

    name: str
    held: int
    activations: int
    libraries: int

    @property
    def peak(self) -> int:
        return self.held + self.activations + self.libraries


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes by part, of training; the other phases as a whole. `total` is the peak of the largest phase on the device.

    On a CPU it is without what importing torch takes.

    Attributes:
        on_cpu: whether the device is the CPU: the averages are in its memory too then.
        weights: the frozen base, as far as it is on the device.
        adapter: the trained parameters.
        moments: the optimizer's two.
        gradient: the flat fp32 sum over accumulated passes.
        activations: peak of one forward and backward pass, the parameters' own gradients included.
        update: what the optimizer needs on top for a moment, after the activations are gone.
        averages: fp32 averages of the adapter, on the CPU.
        checkpoint: one checkpoint on disk.
        heads: of an adversary: weights, moments and gradient.
        training_adapter: the one that is on beside what is trained, frozen.
        encoders: both text encoders, where they stay to encode every batch (`text_cache: none`).
        preparing: the phases before training.
        between: the phases between training's steps, drawing and measuring.
        blocks: the frozen tensors' bytes of each block, in order.
        kinds: kinds of block, see `model.compiling.CompiledBlocks`.
        waiting: how many of them wait in RAM, see `model.offload`.
        unchecked: the activations without gradient checkpointing, under `gradient_checkpointing: auto`; else None.
        kept: under auto, how many blocks keep what they compute for backward.
    """

    on_cpu: bool
    weights: int
    adapter: int
    moments: int
    gradient: int
    activations: int
    update: int
    averages: int
    checkpoint: int
    heads: int = 0
    training_adapter: int = 0
    encoders: int = 0
    preparing: tuple[Phase, ...] = ()
    between: tuple[Phase, ...] = ()
    blocks: Sequence[Sequence[int]] = ()
    kinds: int = 0
    waiting: int = 0
    unchecked: int | None = None
    kept: int = 0

    def keeping(self, count: int) -> Estimate:
        """The same run with `count` blocks that are not computed again in backward; of `gradient_checkpointing: auto`.

        Blocks of both kinds are spread evenly: for FLUX.1 the straight line is within 1.5 % of what is traced.
        """
        assert self.unchecked is not None
        assert self.kept == 0
        more = (self.unchecked - self.activations) * count // max(1, len(self.blocks))
        return dataclasses.replace(self, activations=self.activations + more, kept=count)

    def offloaded(self, count: int) -> Estimate:
        """The same run with `count` blocks that wait in RAM."""
        saved = offload.saved_bytes(self.blocks, count) - offload.saved_bytes(self.blocks, self.waiting)
        between = tuple(dataclasses.replace(phase, held=phase.held - saved) for phase in self.between)
        return dataclasses.replace(self, weights=self.weights - saved, between=between, waiting=count)

    @property
    def held(self) -> int:
        """What is in the device's memory from the first step to the last."""
        averages = self.averages if self.on_cpu else 0
        trained = self.adapter + self.moments + self.heads
        return self.weights + trained + self.training_adapter + self.encoders + averages

    @property
    def training(self) -> Phase:
        """The training phase."""
        return Phase(
            name="training",
            held=self.held + self.gradient,
            activations=max(self.activations, self.update),
            libraries=libraries(self.on_cpu, self.activations),
        )

    @property
    def phases(self) -> list[Phase]:
        """All of them, in the order of a run."""
        return [*self.preparing, self.training, *self.between]

    @property
    def largest(self) -> Phase:
        """The phase that decides whether the run fits."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def total(self) -> int:
        return self.largest.peak

    @property
    def reserved(self) -> int:
        """What torch's allocator takes of a card for `total`: blocks do not fit into one another without gaps."""
        return self.total if self.on_cpu else int(CARD_RESERVE * self.total)

    @property
    def host(self) -> int:
        """CPU memory that a run on a card holds: averages with a pinned copy of the adapter, and the waiting blocks.

        torch rounds pinned memory up to a power of two.
        """
        pinned = 1 << max(0, self.adapter - 1).bit_length()
        averages = self.averages + pinned if self.averages and not self.on_cpu else 0
        return averages + offload.waiting_bytes(self.blocks, self.waiting)

    def table(self) -> str:
        """Aligned text: a line for each phase, the parts of training below it, the peak last."""
        lines, training = list[str](), self.training
        for phase in self.phases:
            lines.append(_line(phase.name, phase.peak) + ("  <- the largest" if phase == self.largest else ""))
            if phase == training:
                lines += [_line(f"  {name}", size) for name, size in self._parts()]
        lines.append(_line("CPU memory at its peak" if self.on_cpu else "device memory at its peak", self.total))
        if not self.on_cpu:
            lines.append(_line(f"with the allocator's reserve, x {CARD_RESERVE:.2f}", self.reserved))
            lines.append(_line(f"CPU memory beside it: averages{', blocks' if self.waiting else ''}", self.host))
        return "\n".join(lines)

    def _parts(self) -> Iterator[tuple[str, int]]:
        """Of training; they add up to its peak."""
        phase = self.training
        waiting = f", {self.waiting} of {len(self.blocks)} blocks in RAM" if self.waiting else ""
        yield f"base weights{waiting}", self.weights
        if self.encoders:
            yield "text encoders", self.encoders
        yield "adapter", self.adapter
        if self.training_adapter:
            yield "training adapter, frozen", self.training_adapter
        yield "optimizer moments", self.moments
        yield "gradient", self.gradient
        if self.heads:
            yield "heads of the adversary, with moments", self.heads
        pass_is_larger = self.activations >= self.update
        kept = f", {self.kept} of {len(self.blocks)} blocks kept" if self.kept else ""
        yield f"activations{kept or ', largest batch'}" if pass_is_larger else "optimizer step", phase.activations
        if self.on_cpu:
            yield "averages", self.averages
        yield "kernels and holes in the heap" if self.on_cpu else "workspaces and rounding", phase.libraries


def _line(name: str, size: int) -> str:
    return f"{name:<44}{size / MIB:>10,.0f} MiB"


def libraries(on_cpu: bool, activations: int) -> int:
    """What is held besides tensors, in bytes.

    Args:
        on_cpu: whether the CPU computes.
        activations: of the phase, in whose memory gaps are.
    """
    if on_cpu:
        return CPU_KERNELS + int(HEAP_HOLES * activations)
    return CARD_WORKSPACES + int(CARD_ROUNDING * activations)

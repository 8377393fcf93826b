"""Blocks of a transformer that wait in RAM and come to the device one ahead of what computes: for small cards.

Only frozen tensors wait: parameters that require no gradient, and buffers, int8 weights with their scales among them.
While a block computes, the next one that waits is copied beside it, so at most two of them are on the device. In a
backward pass with gradient checkpointing the blocks come in reverse order, and so do the copies.

diffusers' group offloading does not do this: it moves trained parameters with the frozen ones, it takes a block away
when the second forward pass of checkpointing ends, before the backward pass that needs it, and it knows one order only.
A copy here is a tensor of its own. What autograd keeps of it stays valid, whatever is copied or dropped meanwhile.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.errors import OptionError

DEVICES = ["cuda"]
"""Where blocks can be copied beside the computation: a CPU computes with the same RAM that they would wait in."""
LEAST = 3
"""Fewer blocks would be on the device all the time: two of those that wait are there at once."""
CHUNK = 2**28  # torch rounds a piece of pinned memory up to a power of two: tensors share pieces that are full
ALIGNED = 256


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """FLUX's blocks in the order that they compute in: double ones, then single ones."""
    return [*transformer.get_submodule("transformer_blocks"), *transformer.get_submodule("single_transformer_blocks")]  # type: ignore[misc]


def frozen_sizes(block: nn.Module) -> tuple[int, ...]:
    """Bytes of each tensor of a block that may wait."""
    return tuple(_bytes_of(slot.tensor) for slot in _frozen(block))


def spread(count: int, blocks: int) -> list[int]:
    """Which of the blocks wait, if `count` of them do: evenly spread, so that each copy has as long as possible.

    The copy of one block takes longer than a block's pass of few tokens. The blocks that stay on the device between two
    that wait give it their time as well; were the last ones to wait, all copies would queue up there.

    Args:
        count: 0 to `blocks`.
        blocks: of the transformer.
    """
    return [(2 * each + 1) * blocks // (2 * count) for each in range(count)]


def saved_bytes(blocks: Sequence[Sequence[int]], count: int) -> int:
    """Bytes of the device that `count` waiting blocks save: all of them, but for the two neighbours that take most.

    Args:
        blocks: `frozen_sizes` of each.
        count: how many wait.
    """
    sizes = [sum(blocks[index]) for index in spread(count, len(blocks))]
    if len(sizes) < LEAST:
        return 0
    return sum(sizes) - max(one + other for one, other in zip(sizes, [*sizes[1:], sizes[0]], strict=True))


def waiting_bytes(blocks: Sequence[Sequence[int]], count: int) -> int:
    """Bytes of pinned RAM that `count` waiting blocks take, what torch rounds up included; `blocks` as above."""
    return sum(_chunks(size for index in spread(count, len(blocks)) for size in blocks[index])[0])


def fewest(blocks: int, fits: Callable[[int], bool]) -> int:
    """The least number of waiting blocks, of so many, with which something fits; where none is enough, all of them."""
    counts = [0, *range(LEAST, blocks + 1)]
    return next(filter(fits, counts), counts[-1])


def block_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the blocks of a transformer of this configuration, in the order of `blocks_of`."""
    defaults = inspect.signature(FluxTransformer2DModel.__init__).parameters
    kinds = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
    counts = {kind: int(config.get(key, defaults[key].default)) for kind, key in kinds.items()}
    return [f"{kind}.{number}" for kind, count in counts.items() for number in range(count)]


def waiting_names(config: Mapping[str, Any], count: int) -> list[str]:
    """Names of the blocks that wait, if `count` of them do."""
    names = block_names(config)
    return [names[index] for index in spread(count, len(names))]


def check_count(count: int, blocks: int, where: str = "offload_blocks") -> None:
    """Raises OptionError for a number of waiting blocks that the model does not have, or that saves nothing."""
    if count > blocks:
        raise OptionError(f"{count} cannot wait, the model has {blocks} blocks", where, hint="use fewer, or auto")
    if 0 < count < LEAST:
        hint = f"use 0, at least {LEAST}, or auto"
        raise OptionError(f"{count} would save nothing: two of them are on the device at a time", where, hint=hint)


def check_device(device: torch.device | str, where: str = "offload_blocks") -> None:
    """Raises OptionError for a device that blocks cannot be copied to beside its computing."""
    kind = torch.device(device).type
    if kind not in DEVICES:
        raise OptionError(f"is of no use on {kind}", where, hint="leave it out, or use a CUDA device")


def following(index: int, last: int | None, count: int, *, gradient: bool) -> int:
    """Which of `count` waiting blocks is needed after `index`.

    Without gradient they come in order, again and again. With it, in order, and then in reverse order, from the last
    one itself on.

    Args:
        index: the one that computes now.
        last: the one that did before it, in a pass with gradient; None: no such pass is under way.
        count: of blocks that wait.
        gradient: whether gradients are recorded.
    """
    if not gradient:
        return (index + 1) % count
    again = index == last == count - 1
    if last is not None and (index < last or again):
        return max(0, index - 1)
    return min(index + 1, count - 1)


@dataclass(frozen=True)
class _Slot:
    """Where a module keeps a tensor."""

    module: nn.Module
    name: str
    is_parameter: bool

    @property
    def tensor(self) -> Tensor:
        found = (self.module._parameters if self.is_parameter else self.module._buffers)[self.name]
        assert found is not None
        return found

    def put(self, tensor: Tensor) -> None:
        """Replaces the tensor, never its numbers: what autograd has kept of the one before stays as it is."""
        if self.is_parameter:
            self.module._parameters[self.name] = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
        else:
            self.module._buffers[self.name] = tensor


@dataclass
class _Waiting:
    """One block's frozen tensors.

    Attributes:
        homes: of each slot, in RAM, pinned for a card.
        copies: of each slot, on the device; None while there are none.
        arrived: after which the copies are whole, on CUDA.
    """

    slots: list[_Slot]
    homes: list[Tensor]
    copies: list[Tensor] | None = None
    arrived: torch.cuda.Event | None = field(default=None, repr=False)


class BlockOffload:
    """Lets `count` blocks of a transformer wait in RAM and moves all else to the device, in place.

    Args:
        transformer: FLUX's, on the CPU or in part on the device; adapters may be on it.
        count: how many blocks wait, see `check_count`; the others stay on the device.
        device: what computes.

    A pass with gradient needs gradient checkpointing: without, autograd would keep every block on the device.
    """

    def __init__(self, transformer: nn.Module, count: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._last: int | None = None  # the block before, in a pass with gradient
        self._next = 0
        on_card = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device) if on_card else None
        blocks = blocks_of(transformer)
        chosen = [blocks[index] for index in spread(count, len(blocks))]
        slots = [list(_frozen(block)) for block in chosen]
        homes = _in_ram([slot for each in slots for slot in each], pinned=on_card)
        self._waiting = [_Waiting(each, [next(homes) for _ in each]) for each in slots]
        _move_rest(transformer, self.device, {_key(slot) for each in slots for slot in each})
        for index, block in enumerate(chosen):
            block.register_forward_pre_hook(functools.partial(self._enter, index))
            # Always: the second forward pass of checkpointing ends in an exception once it has all that it needs.
            block.register_forward_hook(functools.partial(self._leave, index), always_call=True)

    @property
    def present(self) -> list[int]:
        """Which of the waiting blocks, numbered among themselves, have copies on the device."""
        return [index for index, waiting in enumerate(self._waiting) if waiting.copies is not None]

    def release(self) -> None:
        """Drops the copies that were fetched ahead."""
        for waiting in self._waiting:
            self._drop(waiting)

    def _enter(self, index: int, *_: Any) -> None:
        gradient = torch.is_grad_enabled()
        after = following(index, self._last, len(self._waiting), gradient=gradient)
        self._last = index if gradient else None
        with torch.inference_mode(False), torch.no_grad():  # a copy outlives the pass that it was made in
            for other, waiting in enumerate(self._waiting):
                if other != index:
                    self._drop(waiting)
            here = self._waiting[index]
            copies = self._fetch(here)
            self._await(here)
            for slot, copy in zip(here.slots, copies, strict=True):
                slot.put(copy)
            self._fetch(self._waiting[after])
        self._next = after

    def _leave(self, index: int, *_: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for slot, home in zip(self._waiting[index].slots, self._waiting[index].homes, strict=True):
                slot.put(at_rest(home))
            if self._next != index:  # at the turn from forward to backward the last one is needed again
                self._drop(self._waiting[index])

    def _fetch(self, waiting: _Waiting) -> list[Tensor]:
        """The copies of a block, which are on their way at least.

        Their memory is the computing stream's own, and the copying stream waits for what was asked of that until now.
        So torch's allocator may give them the place of a block that was dropped, and theirs to others afterwards.
        """
        if waiting.copies is None:
            waiting.copies = [torch.empty_like(home, device=self.device) for home in waiting.homes]
            if self._side is None:
                _copy(waiting)
            else:
                self._side.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._side):
                    _copy(waiting)
                    waiting.arrived = self._side.record_event()
        return waiting.copies

    def _await(self, waiting: _Waiting) -> None:
        """Lets the device, not this process, wait until the copies are whole."""
        if waiting.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(waiting.arrived)
            waiting.arrived = None

    def _drop(self, waiting: _Waiting) -> None:
        if waiting.copies is not None:
            self._await(waiting)  # or their memory would be given away while it is still written to
            waiting.copies = None


def at_rest(home: Tensor) -> Tensor:
    """What a module holds while its block is away: the tensor in RAM, so that its numbers can be read."""
    return home


def _copy(waiting: _Waiting) -> None:
    for copy, home in zip(waiting.copies or (), waiting.homes, strict=True):
        copy.copy_(home, non_blocking=True)


def _frozen(block: nn.Module) -> Iterator[_Slot]:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield _Slot(module, name, is_parameter=True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield _Slot(module, name, is_parameter=False)


def _key(slot: _Slot) -> tuple[int, str]:
    return id(slot.module), slot.name


def _move_rest(transformer: nn.Module, device: torch.device, waiting: set[tuple[int, str]]) -> None:
    for module in transformer.modules():
        tensors = ((module._parameters, True), (module._buffers, False))
        found = [(name, is_parameter) for held, is_parameter in tensors for name in held if held[name] is not None]
        for slot in (_Slot(module, name, is_parameter) for name, is_parameter in found):
            with torch.no_grad():
                moved = slot.tensor if _key(slot) in waiting else slot.tensor.to(device)
            if moved is not slot.tensor:  # what is there already stays the same parameter, an optimizer's perhaps
                slot.put(moved)


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _chunks(sizes: Iterable[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Bytes of the pieces of memory that tensors share, and (piece, offset) of each."""
    used, places = list[int](), list[tuple[int, int]]()
    for size in sizes:
        if not used or used[-1] + size > CHUNK:
            used.append(0)
        places.append((len(used) - 1, used[-1]))
        used[-1] += -(-size // ALIGNED) * ALIGNED
    return [1 << max(0, each - 1).bit_length() for each in used], places


def _in_ram(slots: Sequence[_Slot], *, pinned: bool) -> Iterator[Tensor]:
    """The tensors' numbers in pieces of memory of their own; an original goes when its slot is filled."""
    sizes, places = _chunks(_bytes_of(slot.tensor) for slot in slots)
    pieces = dict[int, Tensor]()
    for slot, (piece, offset) in zip(slots, places, strict=True):
        if piece not in pieces:
            pieces[piece] = torch.empty(sizes[piece], dtype=torch.uint8, pin_memory=pinned)
        tensor = slot.tensor.detach()
        part = pieces[piece][offset : offset + _bytes_of(tensor)]
        home = part.view(tensor.dtype).view(tensor.shape)
        home.copy_(tensor)
        slot.put(at_rest(home))
        yield home

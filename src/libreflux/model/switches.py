"""What can be switched off inside a network for a while, and comes back as it was when a block is computed again.

Gradient checkpointing computes a block a second time inside `backward`, when nobody knows any more what was switched
off in the first pass. So the state is read when the block is first computed, and set again for the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


class Switched(nn.Module):
    """A module that does something of its own only while `enabled`.

    Attributes:
        enabled: whether it does.
    """

    enabled: bool = True


@contextmanager
def switched(states: Iterable[tuple[Switched, bool]]) -> Iterator[None]:
    """Within the block each of these modules is on (True) or off; afterwards it is as it was found."""
    wanted = list(states)
    before = [module.enabled for module, _ in wanted]
    try:
        for module, enabled in wanted:
            module.enabled = enabled
        yield
    finally:
        for (module, _), enabled in zip(wanted, before, strict=True):
            module.enabled = enabled


def as_switched_now(root: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context in which every `Switched` module below `root` is as it is at this moment."""
    states = [(module, module.enabled) for module in root.modules() if isinstance(module, Switched)]
    return lambda: switched(states)

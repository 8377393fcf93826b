"""A step of classifier-free guidance: two passes, with the prompt and with the negative one."""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.speed.passes import BASES, OURS, OURS_BF16, OURS_W8A8, STACK, compile_blocks, of_compiled, ours
from benchmarks.speed.sizes import Size, prompt, weight_bytes
from benchmarks.speed.theirs import diffusers_pass, others
from benchmarks.speed.timing import Contender, Run

from libreflux.model.latents import image_ids
from libreflux.model.numerics import pinned
from libreflux.sample.guidance import GuidedVelocity

TOKENS = (60, 3)
"""Of the prompt and of the negative one."""
DIFFUSERS = "diffusers bf16"


def contenders(size: Size, side: int, device: str) -> list[Contender]:
    """Of one guided step."""
    int8, bf16 = weight_bytes(size, 1), weight_bytes(size, 2)
    own = partial(_ours, size, side, device)
    theirs = partial(_theirs, size, side, device)
    return [
        Contender(OURS, partial(own, "int8"), ours=True, bytes=int8),
        Contender(STACK, partial(theirs, "quanto"), bytes=int8, counted=False),
        Contender(DIFFUSERS, partial(theirs, "bf16"), bytes=bf16),
        Contender(OURS_W8A8, partial(own, "w8a8"), ours=True, bytes=int8),
        Contender(OURS_BF16, partial(own, "bf16"), ours=True, bytes=bf16),
        Contender("diffusers, torchao int8", partial(theirs, "torchao"), bytes=int8, counted=False),
    ]


def compiled_contenders(size: Size, side: int, device: str) -> list[Contender]:
    """The same step with compiled blocks, beside the first of `contenders`."""
    own = partial(_ours, size, side, device, compiled=True)
    theirs = partial(_theirs, size, side, device, "bf16", compiled=True)
    return [
        contenders(size, side, device)[0],
        Contender(f"{DIFFUSERS}, compiled", theirs, bytes=weight_bytes(size, 2), counted=False),
        *(Contender(f"ours {base}, compiled", partial(own, base), **of_compiled(size, base)) for base in BASES),
    ]


def _ours(size: Size, side: int, device: str, base: str, *, compiled: bool = False) -> Run:
    transformer = ours(size, device, base, compiled=compiled).eval()
    texts = [prompt(size, tokens, device) for tokens in TOKENS]
    ids = image_ids(side // 8, side // 8, device=device)
    x = torch.randn(1, (side // 16) ** 2, size.config["in_channels"], device=device)
    guided = GuidedVelocity(transformer, texts[0], texts[1], ids, scale=3.5)

    @torch.no_grad()
    def step() -> None:
        with pinned(device, drawing=True):
            guided(x, 0.5, 0)

    return step


def _theirs(size: Size, side: int, device: str, kind: str, *, compiled: bool = False) -> Run:
    transformer = others(size, device, kind).eval()
    if compiled:
        compile_blocks(transformer)
    run = diffusers_pass(size, side, device, transformer)

    @torch.no_grad()
    def step() -> None:
        conditional, unconditional = run(), run()
        unconditional.lerp_(conditional, 3.5)

    return step

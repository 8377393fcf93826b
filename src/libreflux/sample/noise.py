"""Where a picture starts: noise by its seed alone, or latents that the caller has."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from libreflux import seeding
from libreflux.errors import RecipeError
from libreflux.model.latents import pack
from libreflux.printing import counted

Generators = torch.Generator | Sequence[torch.Generator] | None


def noise(seeds: Iterable[int], channels: int, rows: int, columns: int) -> Tensor:
    """[B, channels, rows, columns] fp32, drawn on the CPU: picture i is a function of seeds[i] and the size."""
    return torch.stack(
        [torch.randn(channels, rows, columns, generator=seeding.generator(seed, "noise")) for seed in seeds]
    )


def choose_seeds(seeds: int | Sequence[int] | None, generator: Generators, count: int) -> list[int]:
    """`count` seeds: as given, counted up from one, drawn from a generator (or from one each), or drawn afresh.

    Raises:
        RecipeError: a list of another length, or both seeds and a generator.
    """
    if seeds is not None and generator is not None:
        raise RecipeError("both seeds and a generator were given", hint="pass one of them")
    if seeds is not None and not isinstance(seeds, Iterable):
        first = _seed(seeds)
        return [first + i for i in range(count)]
    if seeds is not None:
        if len(seeds) != count:
            raise RecipeError(
                f"{counted(len(seeds), 'seed')} for {counted(count, 'picture')}",
                hint="give one per picture, or a single number",
            )
        return [_seed(seed) for seed in seeds]
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise RecipeError(
                f"{counted(len(generator), 'generator')} for {counted(count, 'picture')}",
                hint="give one per picture, or one",
            )
        sources: list[torch.Generator | None] = list(generator)
    else:
        sources = [generator] * count
    return [int(torch.randint(2**32, (1,), generator=g, device=g.device if g else "cpu")) for g in sources]


def _seed(value: Any) -> int:
    """A whole number as Python's; 1.7 would be cut, and a text read as one."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise RecipeError(f"cannot be {value!r}", where="seeds", hint="use a whole number, or one for each picture")


def packed_latents(latents: Tensor, count: int, channels: int, rows: int, columns: int) -> Tensor:
    """The caller's start, packed: [B, N, 4C] as diffusers' FluxPipeline takes it, or [B, C, rows, columns].

    Raises:
        RecipeError: another shape, or values that are not finite.
    """
    as_tokens, as_picture = (count, rows * columns // 4, 4 * channels), (count, channels, rows, columns)
    if tuple(latents.shape) not in (as_tokens, as_picture):
        raise RecipeError(
            f"have shape {tuple(latents.shape)}", where="latents", hint=f"use {as_picture}, or packed {as_tokens}"
        )
    if not bool(latents.isfinite().all()):
        raise RecipeError("are not all finite", where="latents", hint="start from standard normal noise")
    return pack(latents.float()) if latents.ndim == 4 else latents.float()


def start(
    latents: Tensor | None,
    seeds: int | Sequence[int] | None,
    generator: Generators,
    shape: tuple[int, int, int, int],
) -> tuple[Tensor, list[int]]:
    """Packed latents [B, N, 4C] for pictures of `shape` [B, C, rows, columns], and their seeds.

    There are no seeds where the caller gave `latents`.

    Raises:
        RecipeError: see `choose_seeds` and `packed_latents`; or latents and a source of noise.
    """
    if latents is None:
        chosen = choose_seeds(seeds, generator, shape[0])
        return pack(noise(chosen, *shape[1:])), chosen
    if seeds is not None or generator is not None:
        raise RecipeError("both latents and a source of noise were given", hint="pass latents alone, or none")
    return packed_latents(latents, *shape), []

"""Averages made after training: any width from stored averages, or the report's LERP over raw checkpoints.

A LoKr is averaged by its factors, and kron(mean w1, mean w2) is not the mean of the krons. The gap between the two is
measured exactly: with weights x that sum to 1, mean_i kron(w1_i, w2_i) - kron(mean w1, mean w2) is the weighted sum of
kron(w1_i - mean w1, w2_i - mean w2), whose norm needs inner products of the factors alone. Likewise for LoRA's product.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from libreflux import files
from libreflux.errors import OptionHint, RunError
from libreflux.model.finite import is_finite, not_finite
from libreflux.places import did_you_mean
from libreflux.training import checkpoint, ema

WORST = 0.2
"""Relative error of a profile above which an average is refused: it would be another one than was asked for."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Averaged:
    """An adapter that is an average of others.

    Attributes:
        tensors: LyCORIS name -> fp32 tensor.
        metadata: of the newest source, with `average` saying what was done.
        steps: of the sources, rising; a step with two tracked widths counts twice.
        error: relative L2 error of the profile; 0 for LERP.
        gap: norm of (mean of the sources' deltas - delta of the mean factors), relative to the delta of the mean.
        worst: the layer with the largest gap, and that.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    steps: list[int]
    error: float
    gap: float
    worst: tuple[str, float]


@dataclass(frozen=True)
class _Source:
    step: int
    file: Any
    path: Path
    prefix: str = ""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        part: Tensor = self.file.get_slice(self.prefix + name)[start:stop]
        return part.double()


@dataclass(frozen=True)
class Kept:
    """What a run has kept, all of it whole: several averages of it need no second look at the files.

    Attributes:
        run: its folder.
        checkpoints: by rising step.
        averages: step that they are of -> file.
    """

    run: Path
    checkpoints: Sequence[checkpoint.Checkpoint]
    averages: Mapping[int, Path]


def kept(run: Path) -> Kept:
    """What a run has kept; reads every file once.

    Raises:
        RunError: no such folder, or a damaged file.
    """
    _run_folder(run)
    found = _complete(run)
    return Kept(run, found, _average_files(run, found))


def average(run: Path, width: float, step: int | None = None) -> Averaged:
    """The average of relative width `width` at `step`, by least squares over the profiles of those that were kept.

    Args:
        run: a run folder; RUN/averages and the averages in RUN/checkpoints are used.
        width: sigma_rel, in [0.01, 0.28].
        step: of the wanted average; None: the newest that was kept. Later ones are not used. With `ema_every` above 1 a
            checkpoint between two updates holds the averages of the update before it.

    Raises:
        RunError: no averages were kept, none at `step`, too few to form this one, or a damaged file among them.
    """
    _run_folder(run)
    check_width(width)
    return average_of(kept(run), width, step)


def check_width(width: float) -> None:
    """Raises RunError for a relative width that no average of this kind has."""
    if not 0.01 <= width <= 0.28:
        raise RunError(f"width {width:g} is not in 0.01 to 0.28", hint="0.05 to 0.15 is usual")


def average_of(found: Kept, width: float, step: int | None = None) -> Averaged:
    """See `average`."""
    with ExitStack() as stack:
        sources, weights, error, wanted = _profile(stack, found, width, step)
        said = {"kind": "power", "sigma_rel": width, "step": wanted, "sources": len(sources), "profile_error": error}
        return _combine(sources, weights, error, said)


def check_average(found: Kept, width: float) -> None:
    """Raises RunError as `average_of` would, before anything is averaged."""
    with ExitStack() as stack:
        _profile(stack, found, width, None)


def _profile(
    stack: ExitStack, found: Kept, width: float, step: int | None
) -> tuple[list[_Source], np.ndarray, float, int]:
    """What is added with which weights, the relative error of the profile, and the step that it is of."""
    run, paths = found.run, found.averages
    if not paths:
        ways = OptionHint("train with ema: [0.05, 0.1] in the recipe, or use `lerp`")
        raise RunError("keeps no averages", where=run, hint=ways)
    wanted = max(paths) if step is None else step
    if wanted not in paths:
        near = ", ".join(map(str, sorted(sorted(paths, key=lambda one: abs(one - wanted))[:3])))
        raise RunError(f"no averages at step {wanted}", where=run, hint=f"the nearest are at {near}")
    sources: list[_Source] = []
    stored: list[tuple[int, float]] = []
    for number in sorted(number for number in paths if number <= wanted):
        file = _open(stack, paths[number])
        for tracked in sorted({float(key.partition("/")[0]) for key in file.keys() if "/" in key}):  # noqa: SIM118
            sources.append(_Source(number, file, paths[number], ema.average_key(tracked, "")))
            stored.append((number, ema.exponent(tracked)))
    weights, error = ema.hindsight_weights(stored, (wanted, ema.exponent(width)))
    if error > WORST:
        hint = "choose a width nearer to the tracked ones, or train with save.averages_every"
        what = f"{len(stored)} averages cannot form width {width:g}: the profile is off by {error:.0%}"
        raise RunError(what, where=run, hint=hint)
    return sources, weights, error, wanted


def cells_of(found: Kept, width: float) -> Averaged:
    """An average of relative width `width` of raw checkpoints, for a run that tracked none.

    Each checkpoint stands for the steps that are nearest to it, and weighs the integral of the profile over them.

    Raises:
        RunError: no complete checkpoint, or a width out of range.
    """
    check_width(width)
    weights = cell_weights([one.step for one in _some(found)], ema.exponent(width))
    said = {"kind": "cells", "sigma_rel": width, "step": found.checkpoints[-1].step, "sources": len(weights)}
    return _of_checkpoints(found, weights, said)


def cell_weights(steps: Sequence[int], gamma: float) -> np.ndarray:
    """[n] fp64 that sum to 1: (b_i / b_n)^(gamma + 1) - (b_(i-1) / b_n)^(gamma + 1), b between neighbouring steps.

    b_0 is 0, and b_n lies as far behind the last step as b_(n-1) lies before it.

    Args:
        steps: of the checkpoints, rising.
        gamma: of the profile.
    """
    at = np.array(steps, np.float64)
    between = (at[1:] + at[:-1]) / 2
    last = 2 * at[-1] - (between[-1] if len(between) else 0.0)
    edges = np.concatenate([[0.0], between, [last]]) / last
    return np.diff(edges ** (gamma + 1))


def lerp(run: Path, alpha: float) -> Averaged:
    """s <- (1 - alpha) s + alpha new over the raw checkpoints by rising step: alpha weighs the NEWEST.

    With alpha = 0.9 nine tenths are the last checkpoint; the average with decay 0.9 is alpha = 0.1.

    Args:
        run: a run folder.
        alpha: in (0, 1].

    Raises:
        RunError: no complete checkpoint, one that is not finite, or alpha out of range.
    """
    _run_folder(run)
    check_alpha(alpha)
    return lerp_of(Kept(run, _complete(run), {}), alpha)


def check_alpha(alpha: float) -> None:
    """Raises RunError for what is no weight of the newest."""
    if not 0 < alpha <= 1:
        raise RunError(f"lerp {alpha:g} is not in (0, 1]", hint="it is the newest checkpoint's weight, e.g. 0.2")


def lerp_of(found: Kept, alpha: float) -> Averaged:
    """See `lerp`; with alpha = 1 it is the last checkpoint."""
    count = len(_some(found))
    said = {"kind": "lerp", "alpha": alpha, "step": found.checkpoints[-1].step, "sources": count}
    return _of_checkpoints(found, lerp_weights(count, alpha), said)


def _some(found: Kept) -> Sequence[checkpoint.Checkpoint]:
    if not found.checkpoints:
        raise RunError("has no complete checkpoint", where=found.run, hint="train first")
    return found.checkpoints


def _of_checkpoints(found: Kept, weights: np.ndarray, said: dict[str, Any]) -> Averaged:
    with ExitStack() as stack:
        sources = [_Source(one.step, _open(stack, one.adapter), one.adapter) for one in found.checkpoints]
        return _combine(sources, weights, 0.0, said)


def lerp_weights(count: int, alpha: float) -> np.ndarray:
    """What each of `count` checkpoints, oldest first, weighs: (1-a)^(n) for the first, a (1-a)^(n-i) for the i-th."""
    weights = alpha * (1 - alpha) ** np.arange(count - 1, -1, -1, dtype=np.float64)
    weights[0] = (1 - alpha) ** (count - 1)
    return weights


def _run_folder(run: Path) -> None:
    if not run.is_dir():
        raise RunError("no such run folder", where=run, hint=did_you_mean(run, "give the `out` of a recipe"))


def _complete(run: Path) -> list[checkpoint.Checkpoint]:
    """The checkpoints whose files agree with their manifest; a damaged one is refused, not passed over."""
    found = checkpoint.listed(run)
    for one in found:
        files.verify_manifest(one.path)
    return found


def _average_files(run: Path, complete: Sequence[checkpoint.Checkpoint]) -> dict[int, Path]:
    """Step that they are of -> file of averages, of the checkpoints and the snapshots; a damaged one is refused."""
    there = [(one.step, one.averages) for one in complete if one.averages.exists()]
    for step, folder in ema.snapshots(run).items():
        files.verify_manifest(folder)
        there.append((step, folder / checkpoint.AVERAGES))
    return {own: path for step, path in there if (own := _step_of(path, step))}


def _step_of(path: Path, step: int) -> int:
    with ExitStack() as stack:
        return ema.step_of(_open(stack, path).metadata(), step)


def _open(stack: ExitStack, path: Path) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(path, framework="pt"))
    except (safetensors.SafetensorError, OSError) as error:
        hint = "remove this file; the others are enough"
        raise RunError(f"not a whole safetensors file ({error})", where=path, hint=hint) from None


def _combine(sources: Sequence[_Source], weights: np.ndarray, error: float, said: dict[str, Any]) -> Averaged:
    last, x = sources[-1], torch.from_numpy(weights)
    names = [key.removeprefix(last.prefix) for key in last.file.keys() if key.startswith(last.prefix)]  # noqa: SIM118
    layers: dict[str, list[str]] = {}
    for name in sorted(name for name in names if not name.endswith(".alpha")):
        layers.setdefault(name.partition(".")[0], []).append(name)
    tensors: dict[str, Tensor] = {}
    rows: dict[str, tuple[float, float]] = {}
    for layer, (first, second) in layers.items():
        alpha = last.file.get_tensor(f"{layer}.alpha")
        if first.endswith(".lokr_w1"):
            (w1, gram1), (w2, gram2) = _mean_and_gram(sources, x, first), _mean_and_gram(sources, x, second)
            gap = x @ (gram1 * gram2) @ x
            size = w1.double().square().sum() * w2.double().square().sum()
            tensors |= {first: w1, second: w2}
        else:
            (down, up), gap, size = _lora(sources, x, first, second, float(alpha))
            tensors |= {first: down, second: up}
        if bad := not_finite({name: tensors[name] for name in (first, second)}):
            _refuse_not_finite(sources, bad)
        tensors[f"{layer}.alpha"] = alpha
        rows[layer] = (max(0.0, float(gap)), float(size))
    worst = max(rows, key=lambda layer: rows[layer][0] / (rows[layer][1] or math.inf))
    total = sum(gap for gap, _ in rows.values()), sum(size for _, size in rows.values())
    metadata = {key: value for key, value in (last.file.metadata() or {}).items() if key not in ("format", ema.STEP)}
    return Averaged(
        tensors=tensors,
        metadata={**metadata, "average": json.dumps(said, sort_keys=True)},
        steps=[source.step for source in sources],
        error=error,
        gap=math.sqrt(total[0] / total[1]) if total[1] else 0.0,
        worst=(worst, math.sqrt(rows[worst][0] / rows[worst][1]) if rows[worst][1] else 0.0),
    )


def _refuse_not_finite(sources: Sequence[_Source], name: str) -> None:
    """Names the first source with NaN or infinity in this tensor, which would be in every average of it."""
    source = next((one for one in sources if not is_finite(one.rows(name))), sources[-1])
    raise RunError(f"{source.prefix}{name} is not finite", where=source.path, hint="remove the folder of this file")


def _mean_and_gram(sources: Sequence[_Source], x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The weighted mean of a tensor over the sources, fp32, and the Gram matrix [N, N] of the deviations from it."""
    shape = sources[0].file.get_slice(sources[0].prefix + name).get_shape()
    height = max(1, CHUNK // max(1, math.prod(shape[1:]) * len(sources)))
    parts, gram = [], torch.zeros(len(x), len(x), dtype=torch.float64)
    for start in range(0, shape[0], height):
        block = torch.stack([source.rows(name, start, start + height).flatten() for source in sources])
        mean = x @ block
        apart = block - mean
        gram += apart @ apart.T
        parts.append(mean)
    return torch.cat(parts).reshape(shape).float(), gram


def _lora(
    sources: Sequence[_Source], x: Tensor, down_name: str, up_name: str, alpha: float
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """(mean down, mean up), and the squared norms of gap and delta: of some of the layer's rows at a time."""
    weighed = list(zip(x.tolist(), sources, strict=True))

    def mean(name: str) -> Tensor:
        total = torch.zeros(sources[0].file.get_slice(sources[0].prefix + name).get_shape(), dtype=torch.float64)
        for weight, source in weighed:
            total.add_(source.rows(name), alpha=weight)
        return total

    mean_down, mean_up = mean(down_name), mean(up_name)
    gap = size = torch.zeros((), dtype=torch.float64)
    height = max(1, CHUNK // mean_down.shape[1])  # the layer itself would be larger than its factors of all sources
    for start in range(0, len(mean_up), height):
        rows = mean_up[start : start + height]
        apart = torch.zeros(len(rows), mean_down.shape[1], dtype=torch.float64)
        for weight, source in weighed:
            up, down = source.rows(up_name, start, start + height), source.rows(down_name)
            apart.addmm_(up.sub_(rows), down.sub_(mean_down), alpha=weight)
        gap = gap + apart.square_().sum()
        size = size + torch.mm(rows, mean_down, out=apart).square_().sum()
    scale = (alpha / len(mean_down)) ** 2
    return (mean_down.float(), mean_up.float()), scale * gap, scale * size

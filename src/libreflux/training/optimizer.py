"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in fp32, and in bf16 with stochastic rounding; learning rates.

bf16 keeps 8 bits of a number: an update below half a unit in the last place vanishes under rounding to nearest, and a
second moment under beta2 = 0.999 cannot fall, since one step takes 0.1 % off it. Stochastic rounding (Gupta et al.
2015, arXiv:1502.02551) keeps both right in expectation: weights, moments and gradients take 8 bytes per parameter.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from libreflux.errors import RunError
from libreflux.recipe import OptimizerSpec
from libreflux.training import bf16_update
from libreflux.training.bf16_update import Factors
from libreflux.training.gradient import flat_gradient
from libreflux.training.optimizer8 import AdamW8bit
from libreflux.training.rounding import Noise, rounding_noise, stochastic_round_

if TYPE_CHECKING:
    from libreflux.training.bf16_kernel import BucketKernel

Schedule = Literal["constant", "cosine", "linear"]
BUCKET = 1 << 22
GENERATOR, HASH = 1, 2
"""Kinds of rounding noise, see `training.rounding`; a state that names none is of the first."""


def lr_at(step: int, *, learning_rate: float, steps: int, warmup: int = 0, schedule: Schedule = "constant") -> float:
    """The learning rate of one step.

    Args:
        step: 0 for the first.
        learning_rate: the peak.
        steps: of the whole run.
        warmup: steps of linear rise; step s < warmup has (s + 1) / warmup of the peak.
        schedule: afterwards; `cosine` and `linear` fall from the peak and would reach 0 at step == steps, so that the
            last step still moves.
    """
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    if schedule == "constant":
        return learning_rate
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "linear":
        return learning_rate * (1 - progress)
    if schedule == "cosine":
        return learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    raise RunError(f"schedule {schedule!r} is unknown", hint="use constant, cosine or linear")


class Optimizer(Protocol):
    """What the training loop needs."""

    def step(self, learning_rate: float, gradient: Tensor | None = None) -> None:
        """One update from a flat fp32 gradient [P], or from the parameters' own `.grad` when None."""

    def zero_grad(self) -> None:
        """Forget the parameters' gradients."""

    def state_dict_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, for safetensors; live: the next step changes it."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict_tensors` gave, to the bit."""


class _AdamW:
    """Named parameters with two moments each, kept in flat buckets, and one step count.

    Elementwise arithmetic over one long vector instead of hundreds of short ones: a LoKr has many tiny factors, and on
    two busy cores every parallel region of theirs waited up to 12 ms for its second thread.
    """

    dtype: torch.dtype

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        rows = list(named_parameters)
        if len({name for name, _ in rows}) < len(rows):
            raise ValueError("parameter names must differ: rounding noise and state are keyed by them")
        wrong = [name for name, parameter in rows if parameter.dtype != self.dtype]
        if not rows or wrong:
            raise RunError(
                f"{type(self).__name__} needs parameters of {self.dtype}",
                where=wrong[0] if wrong else None,
                hint="attach the adapter with parameter_dtype(spec)",
            )
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps = 0
        self.buckets = [_Bucket(bucket) for bucket in _split(rows, BUCKET)]
        self.count = sum(bucket.count for bucket in self.buckets)

    def step(self, learning_rate: float, gradient: Tensor | None = None) -> None:
        """One update.

        Args:
            learning_rate: of this step.
            gradient: flat fp32 [P] in the parameters' order, as `flat_gradient` gives it; None: the parameters' own.
        """
        if gradient is not None and (gradient.shape != (self.count,) or gradient.dtype != torch.float32):
            raise ValueError(f"gradient is {tuple(gradient.shape)} {gradient.dtype}, should be fp32 [{self.count}]")
        self.steps += 1
        offset = 0
        for bucket in self.buckets:
            if gradient is None:
                grad = flat_gradient(parameter for _, parameter in bucket.rows)
            else:
                grad = gradient[offset : offset + bucket.count]
                offset += bucket.count
            with torch.no_grad():
                self._update(bucket, grad, learning_rate)

    def _update(self, bucket: _Bucket, grad: Tensor, learning_rate: float) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        for bucket in self.buckets:
            for _, parameter in bucket.rows:
                parameter.grad = None

    def state_dict_tensors(self) -> dict[str, Tensor]:
        """`step` (int64 scalar) and `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`: views in its shape, no copies."""
        tensors = {"step": torch.tensor(self.steps)}
        for bucket in self.buckets:
            tensors |= bucket.moments()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back a state, to the bit.

        Raises:
            RunError: a missing or leftover name, or another shape or dtype; nothing was changed then.
        """
        own = {key: view for bucket in self.buckets for key, view in bucket.moments().items()}
        odd = sorted({"step", *own} ^ set(tensors))
        odd += [key for key in own if key not in odd and _kind(own[key]) != _kind(tensors[key])]
        if odd:
            hint = "resume with the recipe and adapter the state was saved with"
            raise RunError(f"optimizer state does not fit: {', '.join(odd[:3])}", hint=hint)
        self.steps = int(tensors["step"])
        for key, view in own.items():
            view.copy_(tensors[key])


class _Bucket:
    """Some parameters of one device, with their moments as flat vectors."""

    def __init__(self, rows: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.rows = list(rows)
        self.sizes = [parameter.numel() for _, parameter in rows]
        self.count = sum(self.sizes)
        self.exp_avg = torch.zeros(self.count, dtype=rows[0][1].dtype, device=rows[0][1].device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self._kernel: BucketKernel | None = None

    def kernel(self) -> BucketKernel | None:
        """What moves all its parameters at once, see `training.bf16_kernel`; None where they move one by one."""
        device = self.exp_avg.device
        if device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return None
        from libreflux.training import bf16_kernel

        parameters = [parameter.detach() for _, parameter in self.rows]
        addresses = [parameter.data_ptr() for parameter in parameters]
        if self._kernel is None or self._kernel.addresses != addresses:
            made = bf16_kernel.works_on(device)
            self._kernel = bf16_kernel.BucketKernel(parameters, self.exp_avg, self.exp_avg_sq) if made else None
        return self._kernel

    def gather(self) -> Tensor:
        """The parameters as one fp32 vector."""
        return torch.cat([parameter.detach().reshape(-1) for _, parameter in self.rows]).to(torch.float32)

    def scatter(self, flat: Tensor) -> None:
        """Write a vector of the parameters' dtype back into them."""
        for (_, parameter), part in zip(self.rows, flat.split(self.sizes), strict=True):
            parameter.copy_(part.view(parameter.shape))

    def moments(self) -> dict[str, Tensor]:
        """Views of the moments, by parameter."""
        views = {}
        for kind, flat in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for (name, parameter), part in zip(self.rows, flat.split(self.sizes), strict=True):
                views[f"{name}.{kind}"] = part.view(parameter.shape)
        return views


def _split(rows: Sequence[tuple[str, nn.Parameter]], size: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Runs of neighbours on one device with at most `size` elements, or a single larger parameter."""
    run: list[tuple[str, nn.Parameter]] = []
    count = 0
    for name, parameter in rows:
        if run and (count + parameter.numel() > size or parameter.device != run[0][1].device):
            yield run
            run, count = [], 0
        run.append((name, parameter))
        count += parameter.numel()
    if run:
        yield run


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


class AdamWFP32(_AdamW):
    """torch.optim.AdamW on fp32 parameters, with its state laid open as tensors."""

    dtype = torch.float32

    def _update(self, bucket: _Bucket, grad: Tensor, learning_rate: float) -> None:
        flat = nn.Parameter(bucket.gather())
        flat.grad = grad
        adamw = torch.optim.AdamW(
            [flat], lr=learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        adamw.state[flat] = {
            "step": torch.tensor(float(self.steps - 1)),
            "exp_avg": bucket.exp_avg,
            "exp_avg_sq": bucket.exp_avg_sq,
        }
        adamw.step()
        bucket.scatter(flat.detach())


class AdamWBF16(_AdamW):
    """AdamW on bf16 parameters with bf16 moments; arithmetic in fp32, all three rounded stochastically.

    A step computes torch's AdamW (both bias corrections, decoupled weight decay) from the stored numbers in fp32; the
    parameter moves by the unrounded moments, then parameter and moments are rounded. Rounding noise is a function of
    (seed, step, parameter name), so that ranks and resumed runs agree.

    Args:
        named_parameters: bf16.
        seed: of the run.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, per step learning_rate * weight_decay.

    Attributes:
        rounding: how the noise is made, `HASH`, or `GENERATOR` after loading a state of before there was another.
    """

    dtype = torch.bfloat16

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        seed: int,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(named_parameters, betas=betas, eps=eps, weight_decay=weight_decay)
        self.seed, self.rounding = seed, HASH
        self._scratch: dict[torch.device, bf16_update.Scratch] = {}

    def state_dict_tensors(self) -> dict[str, Tensor]:
        """Also `rounding`, unless it is `GENERATOR`."""
        own = {} if self.rounding == GENERATOR else {"rounding": torch.tensor(self.rounding)}
        return {**super().state_dict_tensors(), **own}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        moments = dict(tensors)
        rounding = int(moments.pop("rounding", torch.tensor(GENERATOR)))
        if rounding not in (HASH, GENERATOR):
            hint = "resume with the version of libreflux that it was saved by, or a newer one"
            raise RunError(f"optimizer state has rounding noise of kind {rounding}, which is unknown", hint=hint)
        super().load_state_tensors(moments)
        self.rounding = rounding

    def _update(self, bucket: _Bucket, grad: Tensor, learning_rate: float) -> None:
        if self.rounding == GENERATOR:
            self._update_by_generator(bucket, grad, learning_rate)
            return
        factors = Factors.at(self.steps, learning_rate, self.betas, self.eps, self.weight_decay)
        noises = [Noise.of(self.seed, self.steps, name) for name, _ in bucket.rows]
        if fused := bucket.kernel():
            fused(grad, factors, noises)
            return
        scratch = self._scratch_on(grad.device)
        flat = (part.split(bucket.sizes) for part in (bucket.exp_avg, bucket.exp_avg_sq, grad))
        for (_, parameter), m, v, g, noise in zip(bucket.rows, *flat, noises, strict=True):
            bf16_update.update(parameter.detach().view(-1), m, v, g, factors=factors, noise=noise, scratch=scratch)

    def _scratch_on(self, device: torch.device) -> bf16_update.Scratch:
        if device not in self._scratch:
            largest = max(size for bucket in self.buckets for size in bucket.sizes)
            at_once = bf16_update.CHUNK if device.type == "cpu" else bf16_update.CHUNK_ON_A_CARD
            self._scratch[device] = bf16_update.Scratch(device, min(at_once, largest))
        return self._scratch[device]

    def _update_by_generator(self, bucket: _Bucket, grad: Tensor, learning_rate: float) -> None:
        beta1, beta2 = self.betas
        m = bucket.exp_avg.float().lerp_(grad, 1 - beta1)
        v = bucket.exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(self.eps)
        p = bucket.gather().mul_(1 - learning_rate * self.weight_decay)
        p.addcdiv_(m, root, value=-learning_rate / (1 - beta1**self.steps))
        noise = [
            rounding_noise(parameter.numel(), 3, self.seed, self.steps, name, parameter.device)
            for name, parameter in bucket.rows
        ]
        flat = torch.empty_like(bucket.exp_avg)
        for row, (target, value) in enumerate(((flat, p), (bucket.exp_avg, m), (bucket.exp_avg_sq, v))):
            stochastic_round_(target, value, torch.cat([part[row] for part in noise]))
        bucket.scatter(flat)


def parameter_dtype(spec: OptimizerSpec) -> torch.dtype:
    """The dtype that an adapter must have for this optimizer."""
    return torch.bfloat16 if spec.kind == "adamw_bf16" else torch.float32


def make_optimizer(
    spec: OptimizerSpec, named_parameters: Iterable[tuple[str, nn.Parameter]], seed: int
) -> AdamWFP32 | AdamWBF16 | AdamW8bit:
    """The optimizer of a recipe over (name, parameter) pairs, e.g. `Adapter.named_parameters()`.

    Raises:
        RunError: no parameters, some of another dtype than `parameter_dtype(spec)`, or no 8-bit moments here.
    """
    if spec.kind == "adamw_8bit":
        return AdamW8bit(named_parameters, betas=spec.betas, weight_decay=spec.weight_decay)
    if spec.kind == "adamw_bf16":
        return AdamWBF16(named_parameters, seed, betas=spec.betas, weight_decay=spec.weight_decay)
    return AdamWFP32(named_parameters, betas=spec.betas, weight_decay=spec.weight_decay)

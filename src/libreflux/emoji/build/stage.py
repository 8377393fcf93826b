"""What the stages of the build share: Muon and AdamW, a fp32 average, states saved and resumed by the same command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from libreflux.emoji.build.muon import Muon
from libreflux.files import atomic_save_safetensors


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Warm-up, then a half cosine to 2 %."""
    import math

    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def trapezoid(step: int, steps: int, warmup: int = 100, cooldown: float = 0.65) -> float:
    """Warm-up, constant, then a linear fall over the last `cooldown` of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.01, (1 - step / steps) / cooldown))


class Stage:
    """Named parameters, their optimiser states and an exponential average in fp32, all in one safetensors file.

    Args:
        file: where the state is kept (`*.safetensors`); written to a sibling first, then renamed.
        lr: of AdamW, which trains vectors and the modules that `edge` names.
        matrix_lr: of Muon, which trains every other parameter of two dimensions or more.
        edge: parts of parameter names: embeddings and the layers at either end, which Muon is not for.
        average: decay of the average per step; its early steps use (1+t)/(10+t), so that the start is forgotten.
    """

    def __init__(
        self,
        file: Path,
        modules: dict[str, torch.nn.Module],
        *,
        lr: float,
        matrix_lr: float,
        average: float,
        edge: tuple[str, ...] = (),
    ) -> None:
        self.file, self.decay, self.step = file, average, 0
        self.parameters = {
            f"{part}.{name}": parameter
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        matrices = {n: p for n, p in self.parameters.items() if p.ndim > 1 and not any(part in n for part in edge)}
        others = [p for name, p in self.parameters.items() if name not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices.values(), lr=matrix_lr),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        ]
        self.rates = [matrix_lr, lr]
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.seconds = 0.0

    def resume(self) -> bool:
        if not self.file.exists():
            return False
        with safe_open(self.file, "pt") as saved:
            meta = saved.metadata()
            for name, parameter in self.parameters.items():
                parameter.data.copy_(saved.get_tensor(f"value/{name}"))
                self.average[name].copy_(saved.get_tensor(f"average/{name}"))
            for optimizer in self.optimizers:
                for name, own in self._of(optimizer):
                    optimizer.state[own] = {
                        key: saved.get_tensor(f"{key}/{name}").clone().to(own.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                        if f"{key}/{name}" in saved.keys()  # noqa: SIM118 (a file's keys, no dictionary's)
                    }
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        return True

    def save(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"value/{name}"] = parameter.detach().contiguous()
            tensors[f"average/{name}"] = self.average[name].contiguous()
        for optimizer in self.optimizers:
            for name, own in self._of(optimizer):
                for key, value in optimizer.state[own].items():
                    tensors[f"{key}/{name}"] = value.contiguous()
        atomic_save_safetensors(tensors, self.file, {"step": str(self.step), "seconds": f"{self.seconds:.1f}"})

    def run(
        self,
        steps: int,
        loss: Callable[[int], torch.Tensor | Iterable[torch.Tensor]],
        shape: Callable[[int, int], float],
        *,
        every: int = 200,
    ) -> Iterator[int]:
        """Train to `steps`, yielding after each save.

        Args:
            loss: of a step, by its number alone; in parts that add up to it, where not all are to be held at a time.
        """
        log = self.file.with_suffix(".jsonl")
        began, counted = time.perf_counter(), 0
        total = torch.zeros(())
        while self.step < steps:
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * shape(self.step, steps)
            value = _backward(loss(self.step))
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
            # Added where it was computed: to read it each step would make the host wait for a card.
            total, counted = value + total.to(value.device), counted + 1
            self.step += 1
            now = time.perf_counter()
            self.seconds, began = self.seconds + now - began, now
            if self.step % 20 == 0:
                mean, total, counted = total.item() / counted, torch.zeros(()), 0
                row = {"step": self.step, "loss": round(mean, 5), "seconds": round(self.seconds, 1)}
                with log.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(
                    f"{self.file.stem} {self.step}/{steps} loss {mean:.4f} {self.seconds / self.step:.3f} s/step",
                    flush=True,
                )
            if self.step % every == 0 or self.step == steps:
                self.save()
                yield self.step

    def _of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
        own = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        return [(name, parameter) for name, parameter in self.parameters.items() if id(parameter) in own]

    def use_average(self) -> None:
        """Put the averaged values into the modules (for saving a model, after training)."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.average[name])


def _backward(loss: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    told = []
    for part in (loss,) if isinstance(loss, torch.Tensor) else loss:
        part.backward()
        told.append(part.detach())
    return torch.stack(told).sum()

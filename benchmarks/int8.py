"""Our int8 linear beside optimum-quanto's and torchao's, and a bf16 nn.Linear: time, temporary memory, error.

    python benchmarks/int8.py [--tokens 1024] [--rounds 7] [--threads 2] [--device cpu]

One FLUX.1 feed-forward linear (3072 -> 12288) in bf16. All layers have the same weights and take turns within each
round, so that ratios hold on a busy machine. quanto and torchao are compared where they can be imported.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from libreflux.model.int8 import quantise

IN, OUT = 3072, 12288


def ours(linear: nn.Linear) -> nn.Module:
    return quantise(linear)


def quanto(linear: nn.Linear) -> nn.Module:
    from optimum.quanto import freeze, qint8
    from optimum.quanto import quantize as quanto_quantise

    model = nn.Sequential(linear)
    quanto_quantise(model, weights=qint8)
    freeze(model)
    return model.requires_grad_(False)  # freeze leaves gradients of the base on


def torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8WeightOnlyConfig())
    return model.requires_grad_(False)


def layers(plain: nn.Linear) -> dict[str, nn.Module]:
    made = {"bf16 nn.Linear": plain}
    for name, make in (("ours", ours), ("quanto", quanto), ("torchao", torchao)):
        try:
            made[name] = make(copy.deepcopy(plain))
        except ImportError as error:
            print(f"{name}: skipped ({error})")
    return made


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    return x.grad


PASSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"forward": forward, "forward+backward": forward_backward}


def seconds(call: Callable[[], Tensor], device: str) -> float:
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_bytes(call: Callable[[], Tensor], device: str) -> int:
    """How far memory rises above where it stands, results included: of the allocator on CUDA, else of the process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def timed(made: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds by (layer, pass); the first round is the warm-up."""
    times: dict[tuple[str, str], list[float]] = {(name, what): [] for name in made for what in PASSES}
    for _ in range(rounds + 1):
        for (name, what), taken in times.items():
            taken.append(seconds(partial(PASSES[what], made[name], x), x.device.type))
    return {key: statistics.median(taken[1:]) for key, taken in times.items()}


def table(made: dict[str, nn.Module], x: Tensor, rounds: int, plain: nn.Linear) -> str:
    exact_y = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    exact_gradient = plain.weight.double().sum(dim=0).expand(len(x), -1)  # of the sum of y
    times = timed(made, x, rounds)
    head = [
        "layer",
        *(f"{what}{more}" for what in PASSES for more in (", ms", " / ours", ", peak MB")),
        "error y",
        "error dx",
    ]
    rows = [head, ["---"] * len(head)]
    for name, layer in made.items():
        row = [name]
        for what, run in PASSES.items():
            ratio, peak = times[name, what] / times["ours", what], peak_bytes(partial(run, layer, x), x.device.type)
            row += [f"{1e3 * times[name, what]:.0f}", f"{ratio:.2f}", f"{peak / 1e6:.0f}"]
        row += [f"{relative(forward(layer, x), exact_y):.4f}"]
        row += [f"{relative(forward_backward(layer, x), exact_gradient):.4f}"]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="rows of x: 1024 are those of a 512 px picture")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT).to(options.device, torch.bfloat16).requires_grad_(False)
    x = torch.randn(options.tokens, IN, device=options.device, dtype=torch.bfloat16)
    where = f"{options.device}, {options.threads} threads, torch {torch.__version__}"
    print(f"{IN} -> {OUT}, {options.tokens} tokens, {where}")
    print(table(layers(plain), x, options.rounds, plain))


if __name__ == "__main__":
    main()

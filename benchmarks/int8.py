"""Our int8 linear beside optimum-quanto's and torchao's, and a bf16 nn.Linear: time, temporary memory, error.

    python benchmarks/int8.py [--shapes 3072x12288 12288x3072] [--tokens 1024] [--rounds 7] [--threads 2] [--device cpu]

FLUX.1's feed-forward linears (in x out) in bf16, frozen: forward, and forward with the gradient of the input. All
have the same weights and take turns within each round, so that ratios hold on a busy machine. Errors are relative L2,
against fp64 on the unquantised weights, and against the bf16 linear. quanto and torchao are compared where they can be
imported.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from libreflux.model.int8 import quantise


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
    made: dict[str, nn.Module] = {"bf16 nn.Linear": plain}
    for name, make in (("ours", ours), ("quanto", quanto), ("torchao", torchao)):
        try:
            made[name] = make(copy.deepcopy(plain))
        except ImportError as error:
            print(f"{name}: skipped ({error})")
    return made


def forward(layer: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def forward_backward(layer: nn.Module, x: Tensor, of_y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    layer(x).backward(of_y)
    assert x.grad is not None
    return x.grad


Pass = Callable[[nn.Module, Tensor, Tensor], Tensor]
PASSES: dict[str, Pass] = {"forward": forward, "forward+backward": forward_backward}


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
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the heap still holds would hide what the call needs
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def relative(found: Tensor, exact: Tensor) -> str:
    return f"{float((found.double() - exact.double()).norm() / exact.double().norm()):.4f}"


def timed(made: dict[str, nn.Module], x: Tensor, of_y: Tensor, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds by (layer, pass); the first round is the warm-up."""
    times: dict[tuple[str, str], list[float]] = {(name, what): [] for name in made for what in PASSES}
    for _ in range(rounds + 1):
        for (name, what), taken in times.items():
            taken.append(seconds(partial(PASSES[what], made[name], x, of_y), x.device.type))
    return {key: statistics.median(taken[1:]) for key, taken in times.items()}


def table(made: dict[str, nn.Module], x: Tensor, of_y: Tensor, rounds: int, plain: nn.Linear) -> str:
    weight = plain.weight.double()
    exact = {"forward": x.double() @ weight.T + plain.bias.double(), "forward+backward": of_y.double() @ weight}
    times = timed(made, x, of_y, rounds)
    head = [f"{what}{more}" for what in PASSES for more in (", ms", " / bf16", ", peak MB", ", error", ", to bf16")]
    rows = [["layer", *head], ["---"] * (len(head) + 1)]
    for name, layer in made.items():
        row = [name]
        for what, run in PASSES.items():
            taken, base = times[name, what], times["bf16 nn.Linear", what]
            peak = peak_bytes(partial(run, layer, x, of_y), x.device.type)
            found, dense = run(layer, x, of_y), run(plain, x, of_y)
            row += [f"{1e3 * taken:.0f}", f"{taken / base:.2f}", f"{peak / 1e6:.0f}"]
            row += [relative(found, exact[what]), relative(found, dense)]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["3072x12288", "12288x3072"])
    parser.add_argument("--tokens", type=int, default=1024, help="rows of x: 1024 are those of a 512 px picture")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in options.shapes:
        torch.manual_seed(0)
        wide, out = map(int, shape.split("x"))
        plain = nn.Linear(wide, out).to(options.device, torch.bfloat16).requires_grad_(False)
        x = torch.randn(options.tokens, wide, device=options.device, dtype=torch.bfloat16)
        of_y = torch.randn(options.tokens, out, device=options.device, dtype=torch.bfloat16)
        where = f"{options.device}, {options.threads} threads, torch {torch.__version__}"
        print(f"\n{wide} -> {out}, {options.tokens} tokens, {where}")
        print(table(layers(plain), x, of_y, options.rounds, plain), flush=True)


if __name__ == "__main__":
    main()

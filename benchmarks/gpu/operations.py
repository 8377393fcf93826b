"""Operations that one training pass of the whole FLUX.1 dispatches, by kind: about what a card has to launch.

    python benchmarks/gpu/operations.py [--most 12]

Counted on the CPU, half a minute: blocks of FLUX.1's kind, narrow, one and two of each; the difference, 19 and 38
times. What is outside the blocks, and the optimizer, are not in it. Int8 linears take the path of a card.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from benchmarks.speed.operations import Operations
from benchmarks.speed.sizes import FLUX, Size, network, prompt

from libreflux.adapter import plan
from libreflux.model import int8
from libreflux.model.fused_attention import fuse_attention
from libreflux.model.int8 import quantise_model
from libreflux.model.numerics import enable_checkpointing
from libreflux.model.w8a8 import quantise_activations
from libreflux.recipe import AdapterSpec
from libreflux.training.objective import NoisedBatch, flow_matching_loss

NARROW = FLUX | {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32}
BLOCKS = 19, 38
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoKr libreflux-600m": {"kind": "lokr", "preset": "libreflux-600m", "init": "perturbed"},
    "LoRA of rank 16": {
        "kind": "lora",
        "rank": 16,
        "targets": [{"layers": "**.attn.**"}, {"layers": "**.ff.**"}],
    },
    "no adapter in the blocks": {"kind": "lora", "rank": 16, "targets": [{"layers": "x_embedder"}]},
}


def counted(double: int, single: int, *, base: str, adapter: dict[str, Any]) -> Counter[str]:
    """Of one pass, forward and backward, with gradient checkpointing."""
    torch.manual_seed(0)
    size = Size("", NARROW | {"num_layers": double, "num_single_layers": single}, adapter, (0, ()), (), 0, 0)
    made = network(size, "cpu")
    fuse_attention(made)
    if base != "bf16":
        quantise_model(made)
    if base == "w8a8":
        quantise_activations(made, "int8")
    spec = AdapterSpec.model_validate(adapter)
    plan.build(spec, made, plan.plan(spec, made).layers, dtype=torch.bfloat16, seed=0)
    enable_checkpointing(made)
    made.train()
    latents = torch.randn(1, 16, 8, 8)
    batch = NoisedBatch(latents, torch.randn_like(latents), torch.tensor([0.5]), prompt(size, 7, "cpu"))
    with Operations() as operations:
        flow_matching_loss(made, batch).mean().backward()
    return operations.seen


def whole(*, base: str, adapter: dict[str, Any]) -> Counter[str]:
    """Of all of FLUX.1's blocks."""
    first, double, single = (counted(*blocks, base=base, adapter=adapter) for blocks in ((1, 1), (2, 1), (1, 2)))
    kinds = {*first, *double, *single}
    more = ((double, BLOCKS[0]), (single, BLOCKS[1]))
    return Counter({kind: sum(times * (one[kind] - first[kind]) for one, times in more) for kind in kinds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=12, help="kinds to show")
    options = parser.parse_args()
    int8.on_cpu = lambda tensor: False
    for name, adapter in ADAPTERS.items():
        for base in ("bf16", "int8", "w8a8"):
            found = whole(base=base, adapter=adapter)
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in found.most_common(options.most))
            print(f"{base}, {name}: {found.total():,} in all; {kinds}", flush=True)


if __name__ == "__main__":
    main()

"""The estimate of `train --dry-run` beside the measured peak: `python benchmarks/memory.py`, minutes on a CPU.

Each run trains a random model of its size for two steps in a process of its own. Peak memory is the process's maximum
resident set, less what it held when everything was imported and nothing yet built.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

# Name -> transformer configuration, side of the latents, pictures per pass, prompt tokens, LoKr factor.
RUNS = {
    "emoji size": ({"num_layers": 3, "num_single_layers": 6, "attention_head_dim": 64, "num_attention_heads": 4,
                    "joint_attention_dim": 128, "pooled_projection_dim": 128, "axes_dims_rope": (8, 28, 28)},
                   16, 16, 40, 2),
    "250 M": ({"num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128, "num_attention_heads": 8,
               "joint_attention_dim": 512, "pooled_projection_dim": 256}, 32, 2, 128, 4),
    "1 B": ({"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 24,
             "joint_attention_dim": 4096, "pooled_projection_dim": 768}, 32, 1, 256, 4),
}  # fmt: skip


def measure(name: str) -> tuple[float, float]:
    """(estimated, measured) MiB of one run, in this process."""
    import torch
    from diffusers import FluxTransformer2DModel

    from libreflux.adapter.files import attach
    from libreflux.adapter.layers import linear_shapes
    from libreflux.adapter.targets import Target, resolve
    from libreflux.model.text import TextConditioning
    from libreflux.train import estimate
    from libreflux.train.objective import flow_matching_loss
    from libreflux.train.optimizer import AdamWBF16, clip_grad_norm
    from libreflux.train.step import accumulate_gradient

    config, side, batch, tokens, factor = RUNS[name]
    meta = estimate.meta_transformer({**config, "guidance_embeds": False}, torch.bfloat16)
    layers = resolve(linear_shapes(meta), [Target(layers="**", factor=factor)])
    found = estimate.estimate(
        meta, layers, adapter_dtype=torch.bfloat16, batch=batch, latent_size=(side, side), text_tokens=tokens
    )
    torch.nn.functional.linear(torch.ones(8, 8).bfloat16(), torch.ones(8, 8).bfloat16())  # start the thread pool
    before = _resident()
    torch.set_default_dtype(torch.bfloat16)
    transformer = FluxTransformer2DModel(**config)
    torch.set_default_dtype(torch.float32)
    adapter = attach(transformer, layers, dtype=torch.bfloat16, init="ones")
    optimizer = AdamWBF16(adapter.named_parameters(), seed=0)
    parameters = list(adapter.parameters())
    for _ in range(2):
        gradient = torch.zeros(sum(parameter.numel() for parameter in parameters))
        wide, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
        text = TextConditioning([torch.randn(tokens, wide) for _ in range(batch)], torch.randn(batch, pooled))
        latents = torch.randn(batch, 16, side, side)
        losses = flow_matching_loss(transformer, latents, torch.randn_like(latents), torch.rand(batch), text)
        losses.sum().backward()
        del losses
        accumulate_gradient(gradient, parameters)
        clip_grad_norm(gradient, 1.0)
        optimizer.step(1e-4, gradient)
    return found.total / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    print(f"{'run':<12}{'estimated':>12}{'measured':>12}{'ratio':>8}   (MiB)")
    for name in RUNS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        estimated, measured = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<12}{estimated:>12,.0f}{measured:>12,.0f}{estimated / measured:>8.2f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()

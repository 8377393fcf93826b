"""Which operation of a training pass goes wrong on a card: small cases beside the CPU, one a process.

    python3 benchmarks/gpu/attention.py list
    python3 benchmarks/gpu/attention.py "128 as flux"

An illegal memory access spoils a process for good, hence one case a process. Attention is called here as torch chooses
it, cuDNN's included, which libreflux never takes for gradients. Errors are relative, in the Frobenius norm.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from libreflux.adapter import plan
from libreflux.adapter.layers import lokr_apply
from libreflux.model.opening import open_model
from libreflux.model.text import TextConditioning
from libreflux.recipe import AdapterSpec
from libreflux.training.objective import NoisedBatch, flow_matching_loss

Found = tuple[list[str], list[Tensor]]
"""Names of tensors, and they."""


def error(there: Sequence[Tensor], here: Sequence[Tensor]) -> float:
    """Of what was computed there, beside what was computed here."""
    one, other = (torch.cat([part.detach().float().cpu().flatten() for part in parts]) for parts in (there, here))
    return float((one - other).norm() / other.norm())


def attention(
    device: str,
    *,
    batch: int = 1,
    heads: int,
    tokens: int,
    head_dim: int,
    masked: bool = False,
    strided: bool = False,
    backend: SDPBackend | None = None,
) -> Found:
    """Attention and its gradients: fp32 on the CPU, bf16 on a card; strided as FLUX takes the result."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    drawn = [torch.randn(batch, tokens, heads, head_dim, generator=generator) for _ in range(4)]
    query, key, value = (one.to(device, dtype).requires_grad_() for one in drawn[:3])
    of_out = drawn[3].to(device, dtype)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[:, 5:12] = False
    given = mask[:, None, None, :].to(device) if masked else None
    with _only(backend, device):
        q, k, v = (one.transpose(1, 2) for one in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
        if strided:
            out.transpose(1, 2).flatten(2, 3).backward(of_out.flatten(2, 3))
        else:
            out.backward(of_out.transpose(1, 2).contiguous())
    print(f"  {device}: {type(out.grad_fn).__name__}")
    grads = [one.grad for one in (query, key, value) if one.grad is not None]
    return ["out", "dq", "dk", "dv"], [out, *grads]


def lokr(device: str) -> Found:
    """A LoKr's gradients: fp32 on the CPU, bf16 on a card."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    drawn = [torch.randn(shape, generator=generator) for shape in ((300, 256), (4, 4), (64, 64))]
    x, w1, w2 = (one.to(device, dtype).requires_grad_() for one in drawn)
    out = lokr_apply(x, w1, w2)
    out.square().sum().backward()
    return ["out", "dx", "dw1", "dw2"], [out, *(one.grad for one in (x, w1, w2) if one.grad is not None)]


def emoji(device: str, *, lengths: Sequence[int], dtype: torch.dtype) -> Found:
    """Loss and the adapter's gradient of one pass of emoji-schnell, everything as torch chooses it."""
    transformer = open_model("emoji-schnell").load_transformer(dtype=dtype, device=device)
    transformer.train()
    spec = AdapterSpec.model_validate({"targets": [{"layers": "**.attn.**", "factor": 4}], "init": "perturbed"})
    adapter = plan.build(spec, transformer, plan.plan(spec, transformer).layers, dtype=torch.bfloat16, seed=0)
    config, generator = transformer.config, torch.Generator().manual_seed(1)
    tokens = [torch.randn(length, config.joint_attention_dim, generator=generator) for length in lengths]
    text = TextConditioning(tokens, torch.randn(len(lengths), config.pooled_projection_dim, generator=generator))
    latents, noise = torch.randn(2, len(lengths), config.in_channels // 4, 16, 16, generator=generator)
    sigma = torch.rand(len(lengths), generator=generator)
    batch = NoisedBatch(latents.to(device), noise.to(device), sigma.to(device), text.to(device))
    loss = flow_matching_loss(transformer, batch)
    loss.mean().backward()
    grads = [one.grad for one in adapter.parameters() if one.grad is not None]
    print(f"  {device}: loss {loss.tolist()}, gradients not finite: {sum(not g.isfinite().all() for g in grads)}")
    return ["loss", "gradient"], [loss, torch.cat([grad.float().flatten() for grad in grads])]


def _only(backend: SDPBackend | None, device: str) -> AbstractContextManager[None]:
    return sdpa_kernel(backend) if backend is not None and device != "cpu" else contextlib.nullcontext()


small = partial(attention, batch=2, heads=4, tokens=71, head_dim=64)
flux = partial(attention, heads=24, tokens=1088, head_dim=128)
CASES: dict[str, Callable[[str], Found]] = {
    "64": small,
    "64 masked": partial(small, masked=True),
    "64 as flux": partial(small, strided=True),
    "128": flux,
    "128 masked": partial(flux, batch=2, masked=True),
    "128 masked, efficient": partial(flux, batch=2, masked=True, backend=SDPBackend.EFFICIENT_ATTENTION),
    "128 as flux": partial(flux, strided=True),
    "128 as flux, flash": partial(flux, strided=True, backend=SDPBackend.FLASH_ATTENTION),
    "128 as flux, masked": partial(flux, batch=2, masked=True, strided=True),
    "lokr": lokr,
    "emoji bf16": partial(emoji, lengths=[7], dtype=torch.bfloat16),
    "emoji fp32, two lengths": partial(emoji, lengths=[12, 7], dtype=torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("list", *CASES), metavar="CASE", help="`list`, or one of what that prints")
    parser.add_argument("--device", default="cuda", help="beside the CPU")
    options = parser.parse_args()
    if options.case == "list":
        print("\n".join(CASES))
        return
    print(f"# {options.case}")
    names, here = CASES[options.case]("cpu")
    _, there = CASES[options.case](options.device)
    print("  " + ", ".join(f"{name} {error([a], [b]):.5f}" for name, a, b in zip(names, there, here, strict=True)))


if __name__ == "__main__":
    main()

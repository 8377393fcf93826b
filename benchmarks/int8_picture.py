"""What int8 does to a picture, beside what bf16 does to it: the same text, noise and VAE, another transformer.

    python benchmarks/int8_picture.py DENSE INT8 [--prompts "a red apple" ...] [--steps 28] [--guidance 4] [--seed 0]

DENSE and INT8 are two forms of one model, as `libreflux export DENSE --int8 --out INT8` makes them; both are drawn with
in fp32 and in bf16. Per pair, over the prompts: relative L2 of the final latents, PSNR of the decoded pictures in
[0, 1]. The last row is another picture of the same prompt by the same weights.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from libreflux.emoji.build.check import prompts
from libreflux.model.opening import open_model
from libreflux.model.text import TextEncoders
from libreflux.sample.output import decoded
from libreflux.sample.pipeline import LibreFluxPipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAIRS = (
    ("dense bf16", "dense fp32"),
    ("int8 fp32", "dense fp32"),
    ("int8 bf16", "dense bf16"),
    ("int8 bf16", "dense fp32"),
    ("another seed", "dense fp32"),
)


def draw(
    shared: tuple[AutoencoderKL, TextEncoders], name: str, dtype: str, options: argparse.Namespace, seed: int
) -> tuple[Tensor, Tensor]:
    """Latents [P, C, H/8, W/8] and pictures [P, 3, H, W] in [0, 1], of this transformer and the shared other parts."""
    (vae, text), source = shared, open_model(name)
    transformer = source.load_transformer(dtype=DTYPES[dtype], device=options.device)
    pipe = LibreFluxPipeline.from_parts(transformer, vae, text, source.facts)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        options.prompts,
        seeds=seed,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        output_type="latent",
    )
    assert isinstance(drawn.images, Tensor)
    return drawn.images, decoded(vae, drawn.images, tile=False)


def row(name: str, to: str, latents: dict[str, Tensor], pictures: dict[str, Tensor]) -> str:
    far = (latents[name] - latents[to]).flatten(1).norm(dim=1) / latents[to].flatten(1).norm(dim=1)
    decibel = -10 * (pictures[name] - pictures[to]).square().flatten(1).mean(1).log10()
    return f"| {name} | {to} | {far.mean():.4f} | {far.max():.4f} | {decibel.mean():.1f} | {decibel.min():.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("int8")
    parser.add_argument("--prompts", nargs="+", default=prompts()[:8])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dense, fp32 = open_model(options.dense), {"dtype": torch.float32, "device": options.device}
    shared = dense.load_vae(**fp32), dense.load_text(**fp32)
    latents, pictures = {}, {}
    forms = [(f"{kind} {dtype}", getattr(options, kind), dtype, 0) for kind in ("dense", "int8") for dtype in DTYPES]
    for label, name, dtype, more in [*forms, ("another seed", options.dense, "fp32", len(options.prompts))]:
        latents[label], pictures[label] = draw(shared, name, dtype, options, options.seed + more)
    print(f"{len(options.prompts)} prompts, {options.steps} steps, guidance {options.guidance:g}")
    print("| this | against | latents, relative L2: mean | largest | pictures, PSNR in dB: mean | lowest |")
    print("|---|---|---|---|---|---|")
    for one, other in PAIRS:
        print(row(one, other, latents, pictures))


if __name__ == "__main__":
    main()

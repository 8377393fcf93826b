"""What precision costs on the emoji family: bf16, int8 weights, and W8A8 in int8 and in e4m3, beside fp32.

    python benchmarks/precisions.py [layers|gradient|pictures|training]... --work WORK

layers    by kind of layer, relative L2 error of its product and of the gradient of its input, on the real activations
          of emoji-base; then with outlier channels as FLUX has them (0.5 % of the channels 30 times as large, and their
          weights as much smaller), as it is, smoothed (arXiv:2211.10438, alpha 0.5) and rotated by Hadamard matrices
gradient  error of an adapter's gradient on emoji-schnell against that on its fp32 base, of 16 pictures at a noise level
pictures  distance of pictures and latents from those in fp32
training  loss on held-out pictures of emoji-schnell freed on each base, the same recipe and seed

The family is stored in int8, so fp32 and bf16 mean those weights made dense: what activations lose is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.adapter import plan
from libreflux.adapter.io import attach_file, load_adapter
from libreflux.data.cache_spec import CacheSpec
from libreflux.data.crops import View, bucket_step
from libreflux.data.held_out import HeldOut
from libreflux.data.prepare import prepare
from libreflux.emoji import held_out
from libreflux.emoji.build.check import prompts
from libreflux.model.int8 import Int8Linear, dense_weight, quantise_weight
from libreflux.model.opening import open_model
from libreflux.model.w8a8 import Kind, quantise_activations, scaled_product
from libreflux.probing.held_out import model_velocity
from libreflux.probing.metrics.measures import moments
from libreflux.recipe import AdapterSpec, DataSource, Recipe
from libreflux.sample.output import decoded
from libreflux.sample.pipeline import LibreFluxPipeline
from libreflux.training.gradient import flat_gradient
from libreflux.training.loop import fit
from libreflux.training.objective import NoisedBatch, flow_matching_loss, keyed_noise

SIGMAS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 0.98)
BASES: dict[str, tuple[torch.dtype, bool, Kind | None]] = {
    "fp32": (torch.float32, False, None),
    "bf16": (torch.bfloat16, False, None),
    "int8": (torch.bfloat16, True, None),
    "w8a8 int8": (torch.bfloat16, True, "int8"),
    "w8a8 e4m3": (torch.bfloat16, True, "fp8"),
}
OUTLIERS, TIMES = 0.005, 30.0


def base(name: str, model: str = "emoji-base") -> FluxTransformer2DModel:
    dtype, quantise, kind = BASES[name]
    transformer = open_model(model).load_transformer(dtype=dtype, quantise=quantise)
    if quantise:
        quantise_activations(transformer, kind)
    return transformer


def pictures_of(work: Path, count: int) -> HeldOut:
    folder = held_out.write_held_out(work / f"pictures-{count}", count)
    view = View("centre", 128, bucket_step(128))
    data = [DataSource(path=str(folder), caption_dropout=0.0)]
    spec = CacheSpec(model="emoji-base", data=data, views=[view], text_padding="drop", out=work / f"cache-{count}")
    cache, sources = prepare(spec)
    return HeldOut(cache, sources, view=view, count=count)


def batches(work: Path) -> Iterator[NoisedBatch]:
    """16 pictures at each of the noise levels."""
    for part in pictures_of(work, 16).batches(16):
        for sigma in SIGMAS:
            shape = part.latents.shape[1:]
            noise = torch.stack([keyed_noise(shape, 0, name, str(sigma)) for name in part.sample_ids])
            yield NoisedBatch(part.latents, noise, torch.full((len(part),), sigma), part.text)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def kind_of(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


Variant = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, dense weight) as a product of the same value takes them."""


def as_it_is(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x, weight


def smoothed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    factor = (x.abs().amax(0) / weight.abs().amax(0).clamp_min(1e-9)).sqrt().clamp_min(1e-5)
    return x / factor, weight * factor


def rotated(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    block = weight.shape[1] & -weight.shape[1]  # the largest power of two that divides it
    turn = torch.ones(1, 1)
    while len(turn) < block:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)]) / 2**0.5
    return tuple((one.unflatten(1, (-1, block)) @ turn).flatten(1) for one in (x, weight))


def with_outliers(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    channels = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[
        : max(1, int(OUTLIERS * x.shape[1]))
    ]
    factor = torch.ones(x.shape[1])
    factor[channels] = TIMES
    return x * factor, weight / factor


def layer_errors(x: Tensor, weight: Tensor, upstream: Tensor, variant: Variant) -> dict[str, tuple[float, float]]:
    """By precision (error of the product, of the gradient of x before the variant's change)."""
    y = x @ weight.T
    x8, dense = variant(x, weight)
    q, scale = quantise_weight(dense)
    bf16 = (x8.bfloat16() @ (q * scale[:, None]).bfloat16().T, (upstream.bfloat16() @ (q * scale[:, None]).bfloat16()))
    found = {"int8": bf16}
    for kind in ("int8", "fp8"):
        forward = scaled_product(x8.bfloat16(), q.T, scale, None, kind)
        found[f"w8a8 {'int8' if kind == 'int8' else 'e4m3'}"] = (
            forward,
            scaled_product(upstream.bfloat16(), q, None, None, kind, before=scale),
        )
    wanted = upstream @ dense
    return {name: (error(one, y), error(other, wanted)) for name, (one, other) in found.items()}


def layers(work: Path) -> None:
    transformer = base("int8").requires_grad_(False)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                x = args[0].detach().flatten(0, -2).float()[::16]
                out.register_hook(lambda grad: seen.setdefault(name, []).append((x, grad.flatten(0, -2).float()[::16])))

        return hook

    chosen = {name for name, one in transformer.named_modules() if isinstance(one, Int8Linear) and "norm" not in name}
    weights = {name: dense_weight(transformer.get_submodule(name)) for name in chosen}
    for name in chosen:
        transformer.get_submodule(name).register_forward_hook(note(name))
    for batch in batches(work):
        leaf = batch.latents.clone().requires_grad_()
        flow_matching_loss(transformer, NoisedBatch(leaf, batch.noise, batch.sigma, batch.text)).sum().backward()
    for title, change in (("real activations", as_it_is), ("with outlier channels", with_outliers)):
        print(f"\n{title}: error of the product / of the gradient, %")
        variants: dict[str, Variant] = {"as it is": as_it_is, "smoothed": smoothed, "rotated": rotated}
        print(
            "| layer | int8 weights | " + " | ".join(f"{p}, {v}" for p in ("w8a8 int8", "w8a8 e4m3") for v in variants)
        )
        rows: dict[str, list[list[float]]] = {}
        for name, pairs in seen.items():
            x, upstream = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            x, weight = change(x, weights[name])
            by = {v: layer_errors(x, weight, upstream, variant) for v, variant in variants.items()}
            cells = [by["as it is"]["int8"], *(by[v][p] for p in ("w8a8 int8", "w8a8 e4m3") for v in variants)]
            rows.setdefault(kind_of(name), []).append([number for cell in cells for number in cell])
        for kind, found in sorted(rows.items()):
            mean = (100 * torch.tensor(found).mean(0)).view(-1, 2).tolist()
            print(f"| {kind} | " + " | ".join(f"{a:.2f} / {b:.2f}" for a, b in mean) + " |", flush=True)


def gradient(work: Path) -> None:
    spec = AdapterSpec.model_validate({"kind": "lokr", "targets": [{"layers": "**", "factor": 2}]})
    print("\n| base emoji-schnell | " + " | ".join(f"sigma {sigma:g}" for sigma in SIGMAS) + " | all together |")
    print("|---" * (2 + len(SIGMAS)) + "|")
    wanted: list[Tensor] = []
    for name in BASES:
        transformer = base(name, "emoji-schnell")
        adapter = plan.build(spec, transformer, plan.plan(spec, transformer).layers, dtype=torch.float32, seed=0)
        found = []
        for batch in batches(work):
            flow_matching_loss(transformer, batch).mean().backward()
            found.append(flat_gradient(adapter.parameters()))
            for parameter in adapter.parameters():
                parameter.grad = None
        found.append(torch.stack(found).sum(0))
        wanted = wanted or found
        told = [f"{100 * error(one, other):.1f} %" for one, other in zip(found, wanted, strict=True)]
        print(f"| {name} | {' | '.join(told)} |", flush=True)


@torch.no_grad()
def pictures(work: Path) -> None:
    source = open_model("emoji-base")
    vae, text = source.load_vae(dtype=torch.float32), source.load_text(dtype=torch.float32)
    chosen, drawn = prompts()[:8], {}
    for label, name, seed in [*((name, name, 0) for name in BASES), ("another seed", "fp32", 8)]:
        pipe = LibreFluxPipeline.from_parts(base(name), vae, text, source.facts)
        pipe.set_progress_bar_config(disable=True)
        made = pipe(chosen, seeds=seed, num_inference_steps=28, guidance_scale=4.0, output_type="latent").images
        assert isinstance(made, Tensor)
        drawn[label] = (made, decoded(vae, made, tile=False))
    print(
        "\n| base | latents, relative L2 from fp32 | pictures, mean difference of 255 | PSNR, dB |\n|---|---|---|---|"
    )
    wanted = drawn.pop("fp32")
    for name, (latents, images) in drawn.items():
        far = 255 * float((images - wanted[1]).abs().mean())
        psnr = -10 * (images - wanted[1]).square().flatten(1).mean(1).log10()
        print(f"| {name} | {error(latents, wanted[0]):.3f} | {far:.2f} | {float(psnr.mean()):.1f} |", flush=True)


def training(work: Path, steps: int = 60) -> None:
    tree = {
        "model": "emoji-schnell",
        "data": [{"path": str(held_out.write_held_out(work / "train", 192))}],
        "resolution": 128,
        "batch": 16,
        "steps": steps,
        "adapter": {"targets": [{"layers": "**", "factor": 2}]},
        "optimizer": {"kind": "adamw_bf16", "learning_rate": 3e-4, "warmup": 5},
        "samples": {"every": 0},
        "ema": [],
        "device": "cpu",
        "cache": str(work / "train-cache"),
    }
    tested = pictures_of(work, 64)
    print(f"\n| base | held-out loss after {steps} steps, on an fp32 base |\n|---|---|")
    print(f"| before training | {_loss(None, tested):.4f} |", flush=True)
    for name, key in (("bf16", "bf16"), ("int8", "int8"), ("w8a8 int8", "w8a8")):
        run = work / f"run-{key}"
        adapter = fit(Recipe.model_validate({**tree, "base": key, "out": str(run)}))
        print(f"| {name} | {_loss(adapter, tested):.4f} |", flush=True)


@torch.no_grad()
def _loss(adapter: Path | None, tested: HeldOut) -> float:
    transformer = base("fp32", "emoji-schnell")
    if adapter is not None:
        attach_file(transformer, load_adapter(adapter), 1.0)
    total = [
        moments(model_velocity(transformer, part.text), part.latents, part.sample_ids, SIGMAS).error
        for part in tested.batches(16)
    ]
    return float(sum(float(one.mean()) * len(one) for one in total) / len(tested))


PARTS = {"layers": layers, "gradient": gradient, "pictures": pictures, "training": training}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--work", type=Path, required=True)
    told = parser.parse_args(argv)
    if unknown := set(told.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    for name in told.parts or PARTS:
        PARTS[name](told.work)


if __name__ == "__main__":
    main()

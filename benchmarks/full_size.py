"""FLUX.1-schnell's size without a GPU: an int8 model of random weights on disk, opened and drawn with as a user would.

    python -m benchmarks.full_size --folder DIR [--tiny] [--keep] [--steps 2] [--size 256] [--guidance 3.5]
    python -m benchmarks.full_size --folder DIR --train [--tiny] [--keep]

DIR gets about 22 GB, one tensor at a time: the transformer in int8 (11.9 B parameters), T5-XXL, CLIP-L and the VAE in
bf16, all of FLUX.1's own sizes. The tokenizers are the emoji family's: the vocabulary is smaller, the encoders are not.
A process of its own then opens the folder, encodes prompt and negative prompt, lets the encoders go, loads the
transformer, draws and decodes. Peaks are VmHWM. What the same products cost as dense bf16 matrices is measured in that
process, layer shape by layer shape, before and after the steps: their sum over the time of a step is the share of this
machine's matmul speed that is reached. With --train an adapter is trained on it instead, see `full_size_training`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import full_size_training
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from libreflux import seeding
from libreflux.flow.solve import Step
from libreflux.model.facts import Facts, write_facts
from libreflux.model.int8 import Int8Linear, quantise_model
from libreflux.model.int8_files import write_int8
from libreflux.model.locate import WEIGHTS
from libreflux.model.single_file import CONFIGS
from libreflux.model.stream import stream_safetensors
from libreflux.sample.metadata import GenerationRecord
from libreflux.workflows.drawing import open_for_drawing

PROMPTS = ("a small red fox at the left of a rocket, on yellow", "blue")
TINY: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
    "text_encoder": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    "text_encoder_2": {"num_layers": 1, "num_decoder_layers": 1, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
}
Shape = tuple[int, int, int]
"""Rows of x, in_features, out_features."""


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """int8 in [-127, 127], eight to a draw."""
    count = torch.Size(shape).numel()
    drawn = torch.empty(-(-count // 8), dtype=torch.int64)
    drawn.random_(-(2**63), None, generator=seeding.generator(0, "full size", name))
    return drawn.view(torch.int8)[:count].clamp_(min=-127).view(shape)


def weight(name: str, like: Tensor) -> Tensor:
    """bf16: matrices that keep the size of what passes through them, norms of 1, biases of 0."""
    if like.ndim < 2:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    return numbers(name, tuple(like.shape)).to(torch.bfloat16).mul_(1 / (74 * like.shape[-1] ** 0.5))


def transformer_tensors(empty: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, like in empty.state_dict().items():
        if like.dtype == torch.int8:
            yield name, numbers(name, tuple(like.shape))
        elif name.endswith(".scale"):
            inner: Any = empty.get_submodule(name.removesuffix(".scale")).in_features
            yield name, torch.full(like.shape, 1 / (74 * inner**0.5))
        else:
            yield name, weight(name, like)


def write_encoder(folder: Path, model: CLIPTextModel | T5EncoderModel) -> None:
    folder.mkdir()
    tied = set(model.all_tied_weights_keys)
    state = {name: like for name, like in model.state_dict().items() if name not in tied}
    layout = {name: (torch.bfloat16, tuple(like.shape)) for name, like in state.items()}
    tensors = ((name, weight(name, like)) for name, like in state.items())
    stream_safetensors(folder / "model.safetensors", layout, tensors, {"format": "pt"})
    model.config.save_pretrained(folder)


def build(folder: Path, *, tiny: bool) -> None:
    """The model's folder; what is complete of an earlier call stays."""
    if (folder / "model_index.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    small: dict[str, dict[str, Any]] = TINY if tiny else {part: {} for part in TINY}
    clip, t5, vae = (
        json.loads((CONFIGS / f"{part}.json").read_text()) | small[part]
        for part in ("text_encoder", "text_encoder_2", "vae")
    )
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=False, **small["transformer"])
        encoders = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
            "text_encoder_2": T5EncoderModel(T5Config(**t5)),
        }
    config = json.loads(transformer.to_json_string())
    quantise_model(transformer)
    write_int8(folder / "transformer", config, transformer_tensors(transformer))
    for part, encoder in encoders.items():
        write_encoder(folder / part, encoder)
    AutoencoderKL.from_config(vae).to(torch.bfloat16).save_pretrained(folder / "vae")
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(WEIGHTS / "emoji-base" / part, folder / part)
    write_facts(folder, Facts(steps=2, guidance=3.5, licence="none"))
    shutil.copyfile(WEIGHTS / "emoji-base" / "model_index.json", folder / "model_index.json")  # last: it is complete


def peak(field: str = "VmHWM") -> float:
    """GiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def shapes_of(transformer: nn.Module) -> tuple[Counter[Shape], list[torch.utils.hooks.RemovableHandle]]:
    """Counts every linear's product while the model runs."""
    seen: Counter[Shape] = Counter()

    def note(module: Int8Linear | nn.Linear, given: tuple[Tensor, ...]) -> None:
        seen[given[0].numel() // given[0].shape[-1], module.in_features, module.out_features] += 1

    kinds = (Int8Linear, nn.Linear)
    return seen, [one.register_forward_pre_hook(note) for one in transformer.modules() if isinstance(one, kinds)]


def seconds(call: Callable[[], object], least: float) -> float:
    """Of one call: the median of as many as fill `least` seconds, three at least, after one that does not count."""
    times: list[float] = []
    call()
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def dense_seconds(shapes: Mapping[Shape, int], least: float) -> dict[Shape, float]:
    """Of each product as a dense bf16 one."""
    found = {}
    for rows, columns, out in shapes:
        x, w = torch.randn(rows, columns).bfloat16(), torch.randn(out, columns).bfloat16()
        found[rows, columns, out] = seconds(partial(F.linear, x, w), least)
    return found


def int8_seconds(shapes: Mapping[Shape, int], least: float) -> dict[Shape, float]:
    found = {}
    for rows, columns, out in shapes:
        layer = Int8Linear(columns, out, dtype=torch.bfloat16)
        layer.weight.copy_(numbers("timing", (out, columns)))
        x = torch.randn(rows, columns).bfloat16()
        with torch.no_grad():
            found[rows, columns, out] = seconds(partial(layer, x), least)
    return found


def draw(folder: Path, options: argparse.Namespace) -> None:
    """In a process of its own: open, encode, load, draw, decode; the table."""
    times: list[float] = []
    start = time.perf_counter()
    chosen = open_for_drawing(str(folder), device="cpu")
    origin = GenerationRecord(
        prompt=PROMPTS[0],
        negative=PROMPTS[1],
        seed=0,
        steps=options.steps,
        guidance=options.guidance,
        width=options.size,
        height=options.size,
        model=str(folder),
    )
    opened = chosen.load([origin])
    loaded, after_load = time.perf_counter() - start, peak()
    now = peak("VmRSS")
    transformer = opened.pipe.transformer
    seen, hooks = shapes_of(transformer)
    start = time.perf_counter()

    def on_step(step: Step) -> None:
        times.append(time.perf_counter() - start)

    image = opened.draw(origin, on_step)
    whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    steps = [late - early for early, late in zip([0.0, *times], times, strict=False)]
    least = 0.01 if options.tiny else 0.4
    before, ours, after = (of(seen, least) for of in (dense_seconds, int8_seconds, dense_seconds))
    dense = {shape: min(before[shape], after[shape]) for shape in seen}
    total = sum(dense[shape] * count for shape, count in seen.items()) / options.steps
    flops = sum(2 * rows * columns * out * count for (rows, columns, out), count in seen.items()) / options.steps
    parameters = sum(one.numel() for one in transformer.state_dict().values())
    print(f"| parameters of the transformer | {parameters / 1e9:.2f} B |")
    print(f"| encode, let go, load | {loaded:.0f} s |")
    print(f"| resident then | {now:.1f} GiB (peak so far {after_load:.1f}) |")
    print(f"| peak of all | {peak():.1f} GiB |")
    print(
        f"| a step of guidance {options.guidance:g} at {options.size} px | {', '.join(f'{s:.1f}' for s in steps)} s |"
    )
    print(f"| decode and the rest | {whole - times[-1]:.1f} s |")
    speed = flops / total / 1e12
    print(f"| its products | {flops / 1e12:.1f} TFLOP; as dense bf16 {total:.1f} s, at {speed:.2f} TFLOP/s |")
    print(f"| share of matmul speed | {total / min(steps):.0%} |")
    print("\n| rows x in x out | times in a step | dense bf16, ms | int8, ms |\n|---|---|---|---|")
    for shape, count in sorted(seen.items(), key=lambda row: -dense[row[0]] * row[1])[:8]:
        size = " x ".join(map(str, shape))
        print(f"| {size} | {count // options.steps} | {1e3 * dense[shape]:.1f} | {1e3 * ours[shape]:.1f} |")
    low, high = image.convert("L").getextrema()
    print(f"\npicture {image.size}, values {low} to {high}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="the same code in seconds")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--train", action="store_true", help="train an adapter, three steps, instead of drawing")
    for part in ("--draw", "--prepare", "--fit"):
        parser.add_argument(part, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.draw:
        draw(options.folder, options)
        return
    if options.prepare:
        full_size_training.prepare(options.folder, tiny=options.tiny)
        return
    if options.fit:
        full_size_training.run(options.folder, tiny=options.tiny)
        return
    start = time.perf_counter()
    build(options.folder, tiny=options.tiny)
    size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
    told = f"| on disk | {size / 1e9:.1f} GB, written in {time.perf_counter() - start:.0f} s, peak {peak():.1f} GiB |"
    print(f"| what | measured |\n|---|---|\n{told}", flush=True)
    if options.train:
        code = full_size_training.train(options.folder, options)
    else:
        code = subprocess.run(
            [sys.executable, "-m", "benchmarks.full_size", *sys.argv[1:], "--draw"], check=False
        ).returncode
    if not options.keep:
        shutil.rmtree(options.folder)
    sys.exit(code)


if __name__ == "__main__":
    main()

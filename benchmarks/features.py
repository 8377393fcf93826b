"""In which features does a distance tell a base from a spoilt base? Chosen on one half, measured on the other.

    python -m benchmarks.features --work DIR --choose              # writes DIR/choice.json and prints its SHA-256
    python -m benchmarks.features --work DIR                       # then the other half, and the models that are named
    python -m benchmarks.features --work DIR --quick               # a few pictures, to see that it runs

The base is spoilt in two ways: noise on its weights, and few steps. FD and KD of drawn pictures to real ones are
compared in each feature; the feature whose distance tells the base from both is chosen. The halves share no picture,
caption or seed. Freed and distilled models are drawn on the other half alone, after the choice is written.
Pictures are kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from libreflux import plainjson, seeding
from libreflux.data.folders import walk
from libreflux.data.sources import read_lists, read_sidecar
from libreflux.files import atomic_save_safetensors, atomic_write_json, sha256_file
from libreflux.model.opening import open_model
from libreflux.printing import say, say_table
from libreflux.probing.features import features_digest, load_features
from libreflux.probing.judges import Judge, load_judge
from libreflux.probing.metrics.telling import Telling, most_telling, telling
from libreflux.probing.no_training import halves
from libreflux.probing.report.few import ENOUGH
from libreflux.probing.section import SEED_STRIDE
from libreflux.sample.pipeline import LibreFluxPipeline

BATCH = 8
Feature = Callable[[Tensor], Tensor]
"""[B, 3, H, W] in [-1, 1] → [B, D]."""


@dataclass(frozen=True)
class Drawer:
    """How pictures are drawn: a model, its steps and guidance, and noise on its weights, of their own spread."""

    name: str
    model: str
    steps: int
    guidance: float
    noise: float = 0.0


def spoil(module: nn.Module, noise: float) -> None:
    """Adds keyed normal noise to every parameter, `noise` times its standard deviation."""
    with torch.no_grad():
        for name, values in module.named_parameters():
            random = torch.Generator().manual_seed(seeding.key(0, "spoilt", name) % 2**63)
            spread = values.float().std() if values.numel() > 1 else torch.tensor(0.0)
            values.add_((noise * spread * torch.randn(values.shape, generator=random)).to(values))


def drawn(work: Path, how: Drawer, prompts: Sequence[str], side: int | None, first: int = 0) -> Tensor:
    """[N, 3, H, W] in [-1, 1]: a picture of each prompt, its seed its number after `first`; kept in a file."""
    told = [how.__dict__, list(prompts), side, open_model(how.model).hash, *([first] if first else [])]
    mark = seeding.key(0, "features", json.dumps(told))
    file = work / "drawn" / f"{how.name.replace(' ', '-')}-{mark:x}.safetensors"
    if not file.exists():
        pipe = LibreFluxPipeline.from_model(open_model(how.model))
        pipe.set_progress_bar_config(disable=True)
        if how.noise:
            spoil(pipe.transformer, how.noise)
        parts = []
        for start in range(0, len(prompts), BATCH):
            some = list(prompts[start : start + BATCH])
            asked: dict[str, Any] = {
                "guidance_scale": how.guidance,
                "num_inference_steps": how.steps,
                "output_type": "np",
            }
            sizes: dict[str, Any] = {} if side is None else {"height": side, "width": side}
            seeds = list(range(first + start, first + start + len(some)))
            images = pipe(some, seeds=seeds, **asked, **sizes).images
            parts.append(np.asarray(images))
            say(f"{how.name}: {start + len(some)} of {len(prompts)}")
        pixels = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)
        atomic_save_safetensors({"pixels": pixels.mul(255).round().byte().contiguous()}, file)
    return load_file(file)["pixels"].float().div(127.5).sub(1)


def plain_features() -> dict[str, Feature]:
    """Features that no training has made."""
    return {"thumbnail": thumbnail, "spectrum": spectrum, "edges": edges, "random net": random_net()}


def thumbnail(pixels: Tensor) -> Tensor:
    """Colours of an 8 x 8 picture."""
    return nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)


def spectrum(pixels: Tensor) -> Tensor:
    """Logarithm of the mean power in 16 rings of spatial frequency."""
    power = torch.fft.fft2(pixels.mean(1)).abs().square()
    rows, columns = (torch.fft.fftfreq(size) for size in power.shape[-2:])
    ring = (rows[:, None].square() + columns[None].square()).sqrt().mul(32).long().clamp(max=15).flatten()
    total = torch.zeros(len(power), 16).index_add_(1, ring, power.flatten(1))
    return (total / torch.bincount(ring, minlength=16).clamp(min=1) + 1e-6).log()


def edges(pixels: Tensor) -> Tensor:
    """Share of pixels by the size of their step to the neighbour, in 16 logarithmic bins."""
    grey = pixels.mean(1)
    steps = (grey[:, 1:, 1:] - grey[:, :-1, 1:]).abs() + (grey[:, 1:, 1:] - grey[:, 1:, :-1]).abs()
    bins = (steps.clamp(min=1e-3).log2() + 10).div(12).mul(16).long().clamp(0, 15).flatten(1)
    return torch.stack([(bins == one).float().mean(1) for one in range(16)], dim=1)


def random_net() -> Feature:
    """A convolutional network that nobody trained, the same every time."""
    random = torch.Generator().manual_seed(5)
    kernels = [torch.randn(b, a, 3, 3, generator=random) / (9 * a) ** 0.5 for a, b in ((3, 32), (32, 48), (48, 64))]

    def features(pixels: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(pixels, 64)
        for kernel in kernels:
            x = nn.functional.relu(nn.functional.conv2d(x, kernel, stride=2, padding=1))
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1)

    return features


def candidates(args: argparse.Namespace) -> dict[str, Feature]:
    """Every feature that is tried."""
    found = plain_features()
    judges = dict[str, Judge]()
    if args.judge is not None:
        judges["judge"] = load_judge(args.judge)
    if args.features is not None:
        judges[args.features.name] = load_features(args.features)
    for name, judge in judges.items():
        found[name] = _of_judge(judge)
    return found


def _of_judge(judge: Judge) -> Feature:
    return lambda pixels: judge(judge.prepare(pixels)).features


def read_pictures(folder: Path, count: int, side: int) -> tuple[list[str], list[str], Tensor]:
    """(names, captions, [N, 3, side, side] in [-1, 1]) of a captioned folder, the first of each picture's captions."""
    found = walk(folder)
    listed = {path: rows[0].caption for path, rows in read_lists(found.lists).items()}
    names, captions, pixels = [], [], []
    for path in sorted(found.pictures)[:count]:
        beside = [file for file in (path.with_suffix(".txt"), *found.sidecars.get(path, [])) if file.is_file()]
        told = listed.get(path) or next((text for file in beside for text in read_sidecar(file)), "")
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))
        names.append(path.name)
        captions.append(told)
        pixels.append(torch.from_numpy(picture.copy()).permute(2, 0, 1))
    return names, captions, torch.stack(pixels).float().div(127.5).sub(1)


@torch.no_grad()
def compared(args: argparse.Namespace, rows: np.ndarray, others: Sequence[Drawer], first: int = 0) -> list[Telling]:
    """Every feature and distance, of the base against each of the others, on these pictures and their captions."""
    _, captions, pixels = read_pictures(args.data, args.pictures, args.side)
    prompts, real = [captions[row] for row in rows], pixels[torch.from_numpy(rows)]
    base = Drawer("base", args.base, args.steps, args.guidance)
    good = drawn(args.work, base, prompts, args.side, first)
    found = []
    for other in others:
        worse = drawn(args.work, other, prompts, args.side, first)
        for name, feature in candidates(args).items():
            found += telling(name, other.name, feature(good), feature(worse), feature(real), seed=args.seed)
    return found


def halves_by_caption(captions: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(choosing, measuring): the numbers of the pictures; those of one caption are in one half."""
    distinct = list(dict.fromkeys(captions))
    if len(distinct) < 2:
        raise SystemExit("the pictures have fewer than two captions: there are no halves")
    chosen = {distinct[row] for row in halves(distinct, seed)[0]}
    chooses = np.array([caption in chosen for caption in captions])
    return np.flatnonzero(chooses), np.flatnonzero(~chooses)


def told_of(captions: Sequence[str], pixels: Tensor) -> tuple[str, str]:
    """SHA-256 of what the pictures are called, and of what they show."""
    shown = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest(), shown


def judge_digest(place: Path | None) -> str:
    """Of a judge's file or a vision model's folder; "" for none."""
    if place is None:
        return ""
    return features_digest(place) if place.is_dir() else sha256_file(place)


def few(rows: np.ndarray) -> str:
    """What is to be said of so many pictures; "" where they are enough."""
    if len(rows) >= ENOUGH:
        return ""
    return f"Of {len(rows)} pictures: intervals of fewer than {ENOUGH} are too narrow. "


def table(found: Sequence[Telling]) -> str:
    """As Markdown."""
    lines = ["| feature | distance | base | worse | which | apart | effect |", "|---" * 7 + "|"]
    for one in found:
        cells = [f"{each[0]:.4g} [{each[1]:.4g}, {each[2]:.4g}]" for each in (one.good, one.worse)]
        apart = "apart" if one.apart else "paired only" if one.tells else "no"
        told = [one.feature, one.distance, *cells, one.against, apart, f"{one.effect:.1f}"]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="emoji-base")
    parser.add_argument("--data", type=Path, help="captioned real pictures; default: the emoji family's")
    parser.add_argument("--judge", type=Path, help="file of a judge, whose features are tried too")
    parser.add_argument("--features", type=Path, help="folder of a CLIP, DINO or the like, tried too")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=MODEL", help="measured after the choice")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--noise", type=float, default=0.1, help="of a spoilt base, in spreads of each of its tensors")
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--choose", action="store_true", help="write the choice, and measure nothing else")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.pictures, args.steps = min(args.pictures, 8), min(args.steps, 4)
    if args.data is None:
        from libreflux.emoji.held_out import JUDGE, write_held_out

        args.data = write_held_out(args.work / "held-out", args.pictures)
        args.judge = args.judge or JUDGE
    names, captions, pixels = read_pictures(args.data, args.pictures, args.side)
    choosing, measuring = halves_by_caption(captions, args.seed)
    args.decided = [*told_of(captions, pixels), *(judge_digest(one) for one in (args.judge, args.features))]
    fewer = max(1, args.steps // 7)
    spoilt = [
        Drawer("noise", args.base, args.steps, args.guidance, args.noise),
        Drawer("few steps", args.base, fewer, args.guidance),
    ]
    choice, digest = choose(args, choosing, spoilt, names)
    if args.choose:
        return
    also = [one.partition("=") for one in args.also]
    models = [Drawer(name, model, args.steps, args.guidance) for name, _, model in also]
    kept = args.work / "measured.json"
    if kept.is_file() and plainjson.parse(kept.read_text("utf-8"))["choice_sha256"] != digest:
        raise SystemExit(f"{kept} was measured after another choice: move it away first")
    found = compared(args, measuring, [*spoilt, *models], SEED_STRIDE)
    told = {"choice_sha256": digest, "chosen": choice, "rows": [one.as_json() for one in found]}
    atomic_write_json(kept, told)
    chosen = [one for one in found if [one.feature, one.distance] == choice]
    named = choice or "none told the base from both"
    say_table(f"{few(measuring)}Chosen before: {named} ({digest[:12]})\n\n{table(chosen or found)}")


def choose(
    args: argparse.Namespace, rows: np.ndarray, spoilt: Sequence[Drawer], names: Sequence[str]
) -> tuple[list[str] | None, str]:
    """What is chosen on one half, kept in a file that is never written twice, and that file's SHA-256."""
    file = args.work / "choice.json"
    decided = [
        args.base,
        open_model(args.base).hash,
        args.steps,
        args.guidance,
        args.noise,
        args.side,
        args.seed,
        list(names),
        *args.decided,
    ]
    if not file.is_file():
        found = compared(args, rows, spoilt)
        best = most_telling(found)
        told = {"chosen": best, "chosen_on": [names[row] for row in rows], "decided": decided}
        atomic_write_json(file, told | {"rows": [one.as_json() for one in found]})
        say_table(f"{few(rows)}Choosing:\n\n{table(found)}")
    kept, digest = plainjson.parse(file.read_text("utf-8")), hashlib.sha256(file.read_bytes()).hexdigest()
    if kept["decided"] != decided:
        raise SystemExit(f"{file} was chosen with other settings: use them, or another --work")
    say(f"{file}, SHA-256 {digest}: {kept['chosen'] or 'no feature tells the base from both'}")
    return kept["chosen"], digest


if __name__ == "__main__":
    main()

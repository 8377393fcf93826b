"""What few steps cost each model of the emoji family: judged drawings, sharpness, distance, diversity, slope.

    python benchmarks/family.py --work DIR             # after `python -m libreflux.emoji.artists.build all --work DIR`
    python benchmarks/family.py --work DIR --quick     # a tenth of the pictures, for a look

Captions are of scenes that no model was trained on: a subject by an artist, or a place with a size. Every picture is
drawn from a seed of its own, the same for every row. Intervals are bootstrap intervals over pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from libreflux import seeding
from libreflux.emoji.artists import captions as grammar
from libreflux.emoji.artists import held_out
from libreflux.emoji.artists import judge as judges
from libreflux.emoji.artists.build import base
from libreflux.emoji.artists.build.judge import through
from libreflux.emoji.artists.captions import ALL, Told
from libreflux.emoji.artists.scenes import Scene
from libreflux.emoji.artists.subjects import subjects
from libreflux.files import atomic_write_text
from libreflux.model.opening import open_model
from libreflux.printing import say, say_table
from libreflux.probing.judges import Judge, Score, load_judge
from libreflux.probing.metrics.distances import frechet_replicates
from libreflux.probing.metrics.measures import CONFIDENCE, resampled
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import save_png
from libreflux.sample.pipeline import LibreFluxPipeline

KINDS: dict[str, Told] = {"bare": Told(), "look": Told(look=True), "ground": Told(background=True), "full": ALL}
COUNT, PAIR_COUNT, BARE_SEEDS = 64, 64, 16
BATCH = 16
SEED = 61


@dataclass(frozen=True)
class Row:
    """One line of the table: a model as it is drawn."""

    model: str
    steps: int
    guidance: float
    negative: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}, {self.steps} steps, guidance {self.guidance:g}"


ROWS = (
    *(Row("base", 28, guidance) for guidance in (1.0, 2.0, 3.0, 4.0)),
    Row("base", 4, 1.0),
    Row("base", 4, 3.0),
    Row("schnell", 4, 1.0),
    Row("schnell", 4, 3.0),
    Row("libre", 28, 3.0),
    Row("libre", 4, 1.0),
    Row("libre", 4, 3.0),
)


@dataclass(frozen=True)
class Asked:
    """Scenes with what their captions tell, and the captions."""

    scenes: list[Scene]
    told: list[Told]
    texts: list[str]
    kinds: list[str]


def asked(count: int, pairs: int) -> Asked:
    """`count` scenes of one subject for each kind of caption, and `pairs` scenes of two."""
    rows: list[tuple[Scene, Told, str]] = []
    for kind, told in KINDS.items():
        for index in range(count):
            why: held_out.Kind = "place" if index % 2 else "look"
            rows.append((held_out.held_out_scene(why, SEED, index), told, kind))
    for index in range(pairs):
        scene = held_out.held_out_scene("look", SEED + 1, index, pairs=1.0)
        rows.append((scene, Told(look=bool(index % 2), background=True), "pair"))
    texts = [grammar.phrase(scene, told) for scene, told, _ in rows]
    return Asked([row[0] for row in rows], [row[1] for row in rows], texts, [row[2] for row in rows])


def draw(work: Path, row: Row, texts: Sequence[str], seed: int, device: str) -> Tensor:
    """[B, 3, 128, 128] in [-1, 1]: one picture of each caption, seeds counting up from `seed`."""
    pipe = LibreFluxPipeline.from_model(open_model(work / "m" / row.model)).to(device)
    pipe.set_progress_bar_config(disable=True)
    out = []
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        seeds = [seed + start + i for i in range(len(some))]
        drawn = pipe(
            some, guidance_scale=row.guidance, num_inference_steps=row.steps, seeds=seeds, output_type="np"
        ).images
        out.append(torch.as_tensor(np.asarray(drawn)).permute(0, 3, 1, 2).mul(2).sub(1))
    return torch.cat(out).float().cpu()


def kept(work: Path, row: Row, texts: Sequence[str], seed: int, device: str) -> Tensor:
    """What `draw` draws, kept in a file whose name says of what."""
    from safetensors.torch import load_file, save_file

    model = open_model(work / "m" / row.model).hash[:12]
    mark = seeding.key(0, "family-benchmark", json.dumps([list(texts), seed, row.steps, row.guidance, model]))
    file = work / "drawn-pictures" / f"{row.model}-{row.steps}-{row.guidance:g}-{mark}.safetensors"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        save_file({"pixels": draw(work, row, texts, seed, device).add(1).mul(127.5).round().byte()}, file)
    return load_file(file)["pixels"].float().div(127.5).sub(1)


def sharpness(pixels: Tensor) -> np.ndarray:
    """[B]: mean absolute difference of neighbouring pixels, of 255."""
    across = (pixels[..., 1:] - pixels[..., :-1]).abs().mean((1, 2, 3))
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean((1, 2, 3))
    return (127.5 * (across + down) / 2).double().numpy()


def interval(values: np.ndarray) -> str:
    """Mean and bootstrap interval."""
    means = resampled(len(values)) @ values
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def distance(features: Tensor, reference: Tensor) -> str:
    """Fréchet distance of the judge's features, with its interval."""
    found = frechet_replicates(
        features, reference, np.vstack([np.full(len(features), 1 / len(features)), resampled(len(features))])
    )
    low, high = np.quantile(found[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return f"{found[0]:.1f} [{low:.1f}, {high:.1f}]"


def variety(judge: Judge, pixels: Tensor) -> str:
    """Looks and places that the judge sees in the pictures of one caption, and their mean distance."""
    with torch.no_grad():
        seen = judge(pixels).answers
    looks, places = (len(set(seen[head].argmax(1).tolist())) for head in ("look", "place"))
    spread = torch.pdist(pixels.flatten(1)).mean() / (pixels[0].numel() ** 0.5) * 127.5
    return f"{looks} looks, {places} places, {spread:.0f}"


def table(work: Path, rows: Sequence[Row], *, quick: bool, device: str) -> str:
    """The whole table as Markdown."""
    judge = load_judge(work / "judge.safetensors")
    count, pairs = (8, 8) if quick else (COUNT, PAIR_COUNT)
    wanted = asked(count, pairs)
    real = through(base.pixels(wanted.scenes), torch.device("cpu"))
    marks = judges.mark(judge, real, wanted.scenes, wanted.told)
    kinds = [*KINDS, "pair"]
    bare = [f"a {subject.name}" for subject in subjects() if subject.name in ("fox", "car", "cat")]
    bare = [text for text in bare for _ in range(4 if quick else BARE_SEEDS)]

    def line(name: str, pixels: Tensor, found: Score, apart: str, open_to: str) -> str:
        right = found.all.numpy().astype(float)
        shares = [f"{right[[k == kind for k in wanted.kinds]].mean():.2f}" for kind in kinds]
        return " | ".join(["", name, interval(right), *shares, interval(sharpness(pixels)), apart, open_to, ""]).strip()

    head = ["drawn by", "judged right", *kinds, "sharpness", "distance", "three bare captions"]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    lines.append(line("the composer, through the autoencoder", real, marks, "", ""))
    for row in rows:
        drawn = kept(work, row, wanted.texts, 1000, device)
        found = judges.mark(judge, drawn, wanted.scenes, wanted.told)
        open_pictures = kept(work, row, bare, 5000, device).chunk(3)
        words = "; ".join(variety(judge, pictures) for pictures in open_pictures)
        lines.append(line(row.name, drawn, found, distance(found.features, marks.features), words))
        say(lines[-1])
    return "\n".join(lines) + "\n"


def sheets(work: Path, device: str) -> None:
    """`work/sheet-64.png`, the base's pictures of 64 captions, and `work/sheet-steps.png`, few steps beside many."""
    wanted = asked(COUNT, PAIR_COUNT)
    chosen = [int(i) for i in np.linspace(0, len(wanted.texts) - 1, 64)]
    drawn = kept(work, Row("base", 28, 3.0), [wanted.texts[i] for i in chosen], 9000, device)
    save_png(sheet([_pictures(drawn[i : i + 8]) for i in range(0, 64, 8)], [""] * 8, [""] * 8), work / "sheet-64.png")
    texts = [wanted.texts[i] for i in chosen[::8]]
    rows = [
        Row("base", 4, 3.0),
        Row("base", 28, 3.0),
        Row("schnell", 4, 1.0),
        Row("libre", 4, 3.0),
        Row("libre", 28, 3.0),
    ]
    rows = [row for row in rows if (work / "m" / row.model).is_dir()]
    drawn_rows = [_pictures(kept(work, row, texts, 9500, device)) for row in rows]
    save_png(sheet(drawn_rows, [row.name for row in rows], texts), work / "sheet-steps.png")


def _pictures(pixels: Tensor) -> list:
    from PIL import Image

    bytes_ = pixels.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in bytes_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = [row for row in ROWS if (args.work / "m" / row.model).is_dir()]
    text = table(args.work, rows, quick=args.quick, device=args.device)
    atomic_write_text(args.work / "family-table.md", text)
    say_table(text)
    sheets(args.work, args.device)


if __name__ == "__main__":
    main()

"""Who says what is in a picture: a small classifier of subjects and colours, whose features also give distances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from libreflux import plainjson
from libreflux.errors import ModelError
from libreflux.files import atomic_save_safetensors
from libreflux.places import did_you_mean

SCHEMA = "1"
JUDGED_SIDE = 128  # pixels
WIDTHS = (32, 48, 96, 160, 192)


@dataclass(frozen=True)
class Verdict:
    """What a judge sees in B pictures.

    Attributes:
        subjects: [B, number of subjects], logits.
        colours: [B, number of colours], logits.
        features: [B, D] fp32, pooled activations, for distances between sets of pictures.
    """

    subjects: Tensor
    colours: Tensor
    features: Tensor


class Judge(nn.Module):
    """A plain convolutional classifier with two heads; any side that 32 divides will do, 128 is what it is trained at.

    Args:
        subjects: what the first head tells apart.
        colours: what the second head tells apart.

    Attributes:
        side: of the pictures it is shown, pixels.
    """

    subjects: tuple[str, ...]
    colours: tuple[str, ...]
    side: int

    def __init__(self, subjects: Sequence[str], colours: Sequence[str]) -> None:
        super().__init__()
        self.subjects, self.colours, self.side = tuple(subjects), tuple(colours), JUDGED_SIDE
        inputs = (3, *WIDTHS[:-1])
        self.body = nn.Sequential(*[_Stage(a, b, stride=2) for a, b in zip(inputs, WIDTHS, strict=True)])
        self.subject_head = nn.Linear(WIDTHS[-1], len(subjects))
        self.colour_head = nn.Linear(WIDTHS[-1], len(colours))

    def prepare(self, pixels: Tensor) -> Tensor:
        """Decoded pictures [B, 3, H, W] in [-1, 1] as `forward` is shown them: `side` pixels a side."""
        if pixels.shape[-2:] == (self.side, self.side):
            return pixels
        return nn.functional.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)

    def forward(self, pixels: Tensor) -> Verdict:
        """Judges pixels [B, 3, H, W] in [-1, 1]."""
        features = self.body(pixels).mean(dim=(2, 3))
        return Verdict(self.subject_head(features), self.colour_head(features), features.float())

    def save(self, path: Path) -> None:
        """Writes weights in bf16 and both lists of names into one safetensors file."""
        metadata = {"schema": SCHEMA, "subjects": json.dumps(self.subjects), "colours": json.dumps(self.colours)}
        atomic_save_safetensors({k: v.bfloat16() for k, v in self.state_dict().items()}, path, metadata)


class _Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(8, outputs)
        self.mix = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs)
        self.project = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.reduce(x)))
        return x + nn.functional.silu(self.project(self.mix(x)))


def load_judge(path: Path) -> Judge:
    """Reads what `Judge.save` wrote, in fp32, ready to judge.

    Raises:
        ModelError: no such file, or not a judge.
    """
    try:
        with safe_open(path, "pt") as saved:
            meta = saved.metadata() or {}
            tensors = {name: saved.get_tensor(name).float() for name in saved.keys()}  # noqa: SIM118
        if meta["schema"] != SCHEMA:
            raise ModelError(f"judge schema {meta['schema']} is not {SCHEMA}", where=path, hint="update libreflux")
        judge = Judge(plainjson.parse(meta["subjects"]), plainjson.parse(meta["colours"]))
        judge.load_state_dict(tensors)
    except FileNotFoundError:
        raise ModelError("no such judge", where=path, hint=did_you_mean(path)) from None
    except ModelError:
        raise
    except Exception as error:
        hint = "give a file that libreflux wrote for this purpose"
        raise ModelError(f"not a judge ({error})".splitlines()[0], where=path, hint=hint) from None
    return judge.eval().requires_grad_(False)


@dataclass(frozen=True)
class Score:
    """Whether each of B pictures shows what was asked for.

    Attributes:
        subject: [B] bool, the right subject.
        colour: [B] bool, the right background colour.
        features: [B, D] fp32.
    """

    subject: Tensor
    colour: Tensor
    features: Tensor

    @property
    def both(self) -> Tensor:
        """[B] bool, subject and colour."""
        return self.subject & self.colour


@torch.no_grad()
def score(judge: Judge, pixels: Tensor, wanted: Sequence[tuple[str, str]], batch: int = 64) -> Score:
    """Judges pictures against what was asked for.

    Args:
        judge: as loaded.
        pixels: [B, 3, H, W] in [-1, 1].
        wanted: (subject, colour) of each, by the judge's names.
        batch: pictures at once.
    """
    seen = [judge(pixels[start : start + batch].float()) for start in range(0, len(pixels), batch)]
    subjects = torch.tensor([judge.subjects.index(subject) for subject, _ in wanted])
    colours = torch.tensor([judge.colours.index(colour) for _, colour in wanted])
    return Score(
        torch.cat([one.subjects for one in seen]).argmax(1) == subjects,
        torch.cat([one.colours for one in seen]).argmax(1) == colours,
        torch.cat([one.features for one in seen]),
    )

"""Who says what is in a picture: a small classifier with a head for each question; its features also give distances."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from libreflux import plainjson
from libreflux.errors import ModelError
from libreflux.files import atomic_save_safetensors
from libreflux.places import did_you_mean

SCHEMA = "2"
JUDGED_SIDE = 128  # pixels
WIDTHS = (32, 64, 128, 192, 256)
PLACED_WIDTH = 64
FIRST_WIDTHS = (32, 48, 96, 160, 192)  # of schema 1, which asks for a subject and a colour, both of pooled features
SUBJECT, COLOUR = "subject", "colour"
"""The questions that negative prompts are made from; all others are only asked."""


@dataclass(frozen=True)
class Verdict:
    """What a judge sees in B pictures.

    Attributes:
        answers: question → [B, number of its answers], logits; empty of a judge that knows no names.
        features: [B, D] fp32, pooled activations, for distances between sets of pictures.
    """

    answers: Mapping[str, Tensor]
    features: Tensor


class Judge(nn.Module):
    """A plain convolutional classifier; any side that 32 divides will do, 128 is what it is trained at.

    Args:
        questions: question → its answers. A prompt that says an answer as whole words asks the question.
        placed: the questions that depend on where things are: their heads see features pooled to 4 × 4, not to one.
        widths: channels after each halving of the side.
        placed_width: channels of these placed features.

    Attributes:
        side: of the pictures it is shown, pixels.
    """

    questions: dict[str, tuple[str, ...]]
    side: int

    def __init__(
        self,
        questions: Mapping[str, Sequence[str]],
        placed: Collection[str] = (),
        widths: Sequence[int] = WIDTHS,
        placed_width: int = PLACED_WIDTH,
    ) -> None:
        super().__init__()
        if refused := [question for question in questions if question == "all" or not _is_a_name(question)]:
            raise ModelError(f"{refused[0]!r} cannot be a question", hint="choose another word, without a dot")
        self.questions = {question: tuple(answers) for question, answers in questions.items()}
        self.placed, self.widths, self.side = frozenset(placed), tuple(widths), JUDGED_SIDE
        self.placed_width = placed_width
        inputs = (3, *self.widths[:-1])
        self.body = nn.Sequential(*[_Stage(a, b) for a, b in zip(inputs, self.widths, strict=True)])
        self.narrow = nn.Conv2d(self.widths[-1], placed_width, 1) if self.placed else nn.Identity()
        self.heads = nn.ModuleDict(
            {
                question: nn.Linear(16 * placed_width if question in self.placed else self.widths[-1], len(answers))
                for question, answers in self.questions.items()
            }
        )

    @property
    def subjects(self) -> tuple[str, ...]:
        """The answers to `SUBJECT`; none of a judge that is not asked for it."""
        return self.questions.get(SUBJECT, ())

    @property
    def colours(self) -> tuple[str, ...]:
        """The answers to `COLOUR`, of the background."""
        return self.questions.get(COLOUR, ())

    def prepare(self, pixels: Tensor) -> Tensor:
        """Decoded pictures [B, 3, H, W] in [-1, 1] as `forward` is shown them: `side` pixels a side."""
        if pixels.shape[-2:] == (self.side, self.side):
            return pixels
        return F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)

    def forward(self, pixels: Tensor) -> Verdict:
        """Judges pixels [B, 3, H, W] in [-1, 1]."""
        seen = self.body(pixels)
        pooled, placed = seen.mean(dim=(2, 3)), self.narrow(F.adaptive_avg_pool2d(seen, 4)).flatten(1)
        answers = {
            question: head(placed if question in self.placed else pooled) for question, head in self.heads.items()
        }
        return Verdict(answers, pooled.float())

    def save(self, path: Path) -> None:
        """Writes weights in bf16, and the questions with their answers, into one safetensors file."""
        told = {"questions": self.questions, "placed": sorted(self.placed)}
        sizes = {"widths": self.widths, "placed_width": self.placed_width}
        metadata = {"schema": SCHEMA, **{name: json.dumps(value) for name, value in {**told, **sizes}.items()}}
        atomic_save_safetensors({k: v.bfloat16() for k, v in self.state_dict().items()}, path, metadata)


def _is_a_name(question: str) -> bool:
    """Whether torch takes it as a module's name."""
    return bool(question) and "." not in question and not hasattr(nn.ModuleDict, question)


class _Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, outputs)
        self.mix = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs)
        self.project = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.reduce(x)))
        return x + F.silu(self.project(self.mix(x)))


def load_judge(path: Path) -> Judge:
    """Reads what `Judge.save` wrote, in fp32, ready to judge; of schema 1 too.

    Raises:
        ModelError: no such file, or not a judge.
    """
    try:
        with safe_open(path, "pt") as saved:
            meta = saved.metadata() or {}
            tensors = {name: saved.get_tensor(name).float() for name in saved.keys()}  # noqa: SIM118
        if meta["schema"] == "1":
            judge = Judge(
                {SUBJECT: plainjson.parse(meta["subjects"]), COLOUR: plainjson.parse(meta["colours"])},
                widths=FIRST_WIDTHS,
            )
            tensors = {_second(name): tensor for name, tensor in tensors.items()}
        elif meta["schema"] == SCHEMA:
            told = (plainjson.parse(meta[name]) for name in ("questions", "placed", "widths", "placed_width"))
            judge = Judge(*told)
        else:
            raise ModelError(f"judge schema {meta['schema']} is not {SCHEMA}", where=path, hint="update libreflux")
        judge.load_state_dict(tensors)
    except FileNotFoundError:
        raise ModelError("no such judge", where=path, hint=did_you_mean(path)) from None
    except ModelError:
        raise
    except Exception as error:
        hint = "give a file that libreflux wrote for this purpose"
        raise ModelError(f"not a judge ({error})".splitlines()[0], where=path, hint=hint) from None
    return judge.eval().requires_grad_(False)


def _second(name: str) -> str:
    """A tensor's name in schema 2, of its name in schema 1."""
    for question in (SUBJECT, COLOUR):
        name = name.replace(f"{question}_head.", f"heads.{question}.")
    return name


@dataclass(frozen=True)
class Score:
    """Whether each of B pictures shows what was asked for.

    Attributes:
        right: question → [B] bool, and true where it was not asked.
        asked: question → [B] bool.
        features: [B, D] fp32.
    """

    right: Mapping[str, Tensor]
    asked: Mapping[str, Tensor]
    features: Tensor

    @property
    def all(self) -> Tensor:
        """[B] bool: everything that was asked."""
        return torch.stack(list(self.right.values())).all(dim=0)


@torch.no_grad()
def score(judge: Judge, pixels: Tensor, wanted: Sequence[Mapping[str, str]], batch: int = 64) -> Score:
    """Judges pictures against what was asked for.

    Args:
        judge: as loaded.
        pixels: [B, 3, H, W] in [-1, 1].
        wanted: question → answer, of each picture, by the judge's names; the others are not asked.
        batch: pictures at once.
    """
    seen = [judge(pixels[start : start + batch].float()) for start in range(0, len(pixels), batch)]
    right, asked = {}, {}
    for question, answers in judge.questions.items():
        guess = torch.cat([one.answers[question] for one in seen]).argmax(1).tolist()
        asked[question] = torch.tensor([question in one for one in wanted])
        right[question] = torch.tensor(
            [one.get(question, answers[best]) == answers[best] for one, best in zip(wanted, guess, strict=True)]
        )
    return Score(right, asked, torch.cat([one.features for one in seen]))

"""What a model looks at while it draws a picture: attention to each text token, and what changes without its padding.

The maps of FluxAttentionMap, for every step, head and block of both kinds, and with the mask that the pass has. Beside
them a causal test: a token that is looked at need not matter, so the padding is taken out, and the change is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.model.attention_mass import READERS, AttentionMass
from libreflux.model.attention_record import attention_masses
from libreflux.model.offload import blocks_of
from libreflux.model.text import TextConditioning
from libreflux.sample.guidance import GuidedPass

KINDS = ("double", "single")
EDGE = 40
"""Padding tokens next to the text, and at the end, that count as its edges: of short paddings a third each."""


@dataclass(frozen=True)
class TextLayout:
    """The text tokens that FLUX reads of a prompt.

    Attributes:
        tokens: as T5's tokenizer spells them, padding included.
        own: how many at the start are the prompt's own; the last of these is T5's end token.
    """

    tokens: tuple[str, ...]
    own: int

    @property
    def padding(self) -> int:
        """How many are padding."""
        return len(self.tokens) - self.own

    @property
    def regions(self) -> dict[str, range]:
        """words, end_token, and of the padding near, middle and end; those that have a token."""
        edge, last = min(EDGE, self.padding // 3), len(self.tokens)
        found = {
            "words": range(self.own - 1),
            "end_token": range(self.own - 1, self.own),
            "padding_near": range(self.own, self.own + edge),
            "padding_middle": range(self.own + edge, last - edge),
            "padding_end": range(last - edge, last),
        }
        return {name: places for name, places in found.items() if len(places)}


@dataclass
class AttentionRecord:
    """Masses of one picture, on the CPU in fp32; see `AttentionMass`.

    Attributes:
        on_text: [steps, blocks, 3, H, T], by reader as of `READERS`.
        on_image: [steps, blocks, 3, H].
        where: [2, T, N], mean over steps, heads and the blocks of each of `KINDS`.
        kinds: "double" or "single" of each block.
        sigmas: [steps], the noise level of each.
    """

    on_text: Tensor
    on_image: Tensor
    where: Tensor
    kinds: tuple[str, ...]
    sigmas: list[float]

    @property
    def share(self) -> Tensor:
        """[steps, blocks, H, T]: of the image's attention, what each text token gets."""
        return self.on_text[:, :, 0]

    @property
    def even(self) -> float:
        """What every token would get if all got the same."""
        return 1 / (self.where.shape[1] + self.where.shape[2])


def record_bytes(*, steps: int, double: int, single: int, heads: int, text: int, image: int) -> int:
    """What an `AttentionRecord` takes."""
    passes = steps * (double + single) * heads * len(READERS)
    return 4 * (passes * (text + 1) + len(KINDS) * text * image)


def altered_texts(
    own: TextConditioning, layout: TextLayout, empty: TextConditioning, padded: TextConditioning | None
) -> dict[str, TextConditioning]:
    """One prompt's conditioning with its padding taken out, replaced or put in, by name.

    Args:
        own: of the prompt, B = 1.
        layout: of its tokens.
        empty: of the empty prompt, encoded alike.
        padded: of the prompt with padding, where `own` has none; None otherwise, or to leave that out.
    """
    [tokens], count = own.tokens, layout.own
    favoured = own.favoured

    def of(rows: Tensor) -> TextConditioning:
        return TextConditioning([rows], own.pooled, favoured)

    found = {}
    if layout.padding:
        found["padding_removed"] = of(tokens[:count])
        found["padding_replaced"] = of(torch.cat([tokens[:count], empty.tokens[0][count:].to(tokens)]))
        for name, places in layout.regions.items():
            if name.startswith("padding_"):
                found[f"{name}_removed"] = of(torch.cat([tokens[: places.start], tokens[places.stop :]]))
    elif padded is not None:
        found["padding_added"] = padded
    found["prompt_emptied"] = empty
    return found


@dataclass
class AttentionWatcher:
    """Watches the passes of one picture: records the prompt's own, and measures altered texts at the same latents.

    Attributes:
        transformer: that draws it.
        layout: of the prompt's tokens.
        altered: texts by name, see `altered_texts`.
        steps: of the picture.
        advance: called after each altered pass.
        changes: name to ‖v' − v‖ / ‖v‖ at each step, of the velocity without guidance.
    """

    transformer: FluxTransformer2DModel
    layout: TextLayout
    altered: Mapping[str, TextConditioning]
    steps: int
    advance: Callable[[], None] = lambda: None
    changes: dict[str, list[float]] = field(default_factory=dict)
    _record: AttentionRecord | None = None

    def __call__(self, watched: GuidedPass) -> Tensor:
        """The pass's velocity, as it is without a watcher."""
        if not watched.prompted:
            return watched.run(watched.x, watched.text)
        row, width = watched.prompted[0], max(watched.text.lengths)

        def told(block: int, mass: AttentionMass) -> None:
            self._keep(watched, block, mass)

        with attention_masses(self.transformer, told, sample=row, text=width, own=self.layout.own):
            velocity = watched.run(watched.x, watched.text)
        if self.altered:
            x, text = watched.x[row : row + 1], watched.text.index([row])
            # Alone, where it had a companion: batches differ in last bits, and nothing that changed must be exactly 0.
            plain = velocity if len(velocity) == 1 else watched.run(x, text)
            for name, other in self.altered.items():
                self.changes.setdefault(name, []).append(relative_change(watched.run(x, other), plain))
                self.advance()
        return velocity

    @property
    def record(self) -> AttentionRecord:
        """What was recorded, once the picture is drawn."""
        if self._record is None:
            raise ValueError("no pass was watched")
        return self._record

    def _keep(self, watched: GuidedPass, block: int, mass: AttentionMass) -> None:
        text = len(self.layout.tokens)
        if self._record is None:
            self._record = self._empty(mass.on_text.shape[1], text, mass.where.shape[1])
        record = self._record
        if block == 0:
            record.sigmas.append(watched.sigma)
        # A batch may be wider than this prompt: what is beyond it is masked.
        record.on_text[watched.step, block] = mass.on_text[..., :text].cpu()
        record.on_image[watched.step, block] = mass.on_image.cpu()
        kind = record.kinds[block]
        share = 1 / (self.steps * record.kinds.count(kind))
        record.where[KINDS.index(kind)] += share * mass.where[:text].cpu()

    def _empty(self, heads: int, text: int, image: int) -> AttentionRecord:
        double = len(self.transformer.transformer_blocks)
        blocks = len(blocks_of(self.transformer))
        kinds = tuple(KINDS[0] if number < double else KINDS[1] for number in range(blocks))
        shape = (self.steps, blocks, len(READERS), heads)
        return AttentionRecord(
            torch.zeros(*shape, text), torch.zeros(shape), torch.zeros(len(KINDS), text, image), kinds, []
        )


def relative_change(velocity: Tensor, plain: Tensor) -> float:
    """‖v' − v‖ / ‖v‖ over all numbers; 0 where nothing changes, be it that both are 0 as a new model's are."""
    change, norm = (float(torch.linalg.vector_norm(each.float())) for each in (velocity - plain, plain))
    return change / norm if change else 0.0

"""What was found of a model's attention, in numbers that are kept and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from libreflux.model.attention_mass import READERS
from libreflux.printing import counted
from libreflux.probing.attention import AttentionRecord, TextLayout

_DIGITS = 7


@dataclass(frozen=True, eq=False)
class AttentionFound:
    """What was found of one prompt.

    Attributes:
        prompt: the text.
        seed: of its picture.
        layout: of its tokens.
        readers: "image", "own" and, where there is some, "padding" to the shares of their attention by region; with
            "image", the image's tokens, they sum to 1.
        tokens: [T], what each text token gets of the image's attention, mean over steps, blocks and heads.
        by_step, by_block: [steps, T] and [blocks, T] of the same.
        heads: region to [blocks, H] of the same, mean over steps.
        kinds: "double" or "single" of each block.
        sigmas: noise level of each step.
        even: what every token would get if all got the same.
        velocity: name of an alteration to the change ‖v' − v‖ / ‖v‖ at each step.
        pictures: name of an alteration to the mean absolute difference of the picture's values, of 255.
    """

    prompt: str
    seed: int
    layout: TextLayout
    readers: Mapping[str, Mapping[str, float]]
    tokens: np.ndarray
    by_step: np.ndarray
    by_block: np.ndarray
    heads: Mapping[str, np.ndarray]
    kinds: tuple[str, ...]
    sigmas: tuple[float, ...]
    even: float
    velocity: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    pictures: Mapping[str, float] = field(default_factory=dict)

    @property
    def read(self) -> list[int]:
        """The padding tokens that get more than an even share."""
        return [place for place in range(self.layout.own, len(self.tokens)) if self.tokens[place] > self.even]

    def share(self, *regions: str) -> float:
        """Of the image's attention, what the tokens of these regions get."""
        return sum(self.readers["image"].get(region, 0.0) for region in regions)

    @property
    def padding_share(self) -> float:
        """Of the image's attention, what padding gets."""
        return self.share("padding_near", "padding_middle", "padding_end")

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "tokens": [
                {"text": text, "own": place < self.layout.own, "share": _rounded(self.tokens[place])}
                for place, text in enumerate(self.layout.tokens)
            ],
            "even_share": _rounded(self.even),
            "regions": {name: [places.start, places.stop] for name, places in self.layout.regions.items()},
            "attention": {reader: _values(shares) for reader, shares in self.readers.items()},
            "padding_read": self.read,
            "sigmas": _values(self.sigmas),
            "blocks": list(self.kinds),
            "by_step": _regions(self.by_step, self.layout),
            "by_block": _regions(self.by_block, self.layout),
            "by_head": {name: _values(found) for name, found in self.heads.items()},
            "velocity_change": {name: _values(values) for name, values in self.velocity.items()},
            "picture_change": _values(self.pictures),
        }


def found_in(
    record: AttentionRecord,
    *,
    prompt: str,
    seed: int,
    layout: TextLayout,
    velocity: Mapping[str, Sequence[float]],
    pictures: Mapping[str, float],
) -> AttentionFound:
    """The means of a record, and the changes that were measured beside it; see `AttentionFound`."""
    share = record.share
    readers = {}
    for index, reader in enumerate(READERS):
        if reader == "padding" and not layout.padding:
            continue
        on_text = record.on_text[:, :, index].double().mean(dim=(0, 1, 2))
        readers[reader] = {name: float(on_text[list(places)].sum()) for name, places in layout.regions.items()}
        readers[reader]["image"] = float(record.on_image[:, :, index].double().mean())
    return AttentionFound(
        prompt=prompt,
        seed=seed,
        layout=layout,
        readers=readers,
        tokens=_mean(share, 0, 1, 2),
        by_step=_mean(share, 1, 2),
        by_block=_mean(share, 0, 2),
        heads={
            name: _mean(share[..., places.start : places.stop].sum(dim=-1), 0)
            for name, places in layout.regions.items()
        },
        kinds=record.kinds,
        sigmas=tuple(record.sigmas),
        even=record.even,
        velocity={name: tuple(values) for name, values in velocity.items()},
        pictures=dict(pictures),
    )


def sentence(found: Sequence[AttentionFound]) -> str:
    """What was found of these prompts, in one sentence; of several the means."""
    text = 1 - _share(found, "image")
    told = [f"Image tokens give {_percent(text)} of their attention to the text: {_told_words(found)}"]
    told.append(_told_padding(found))
    told += filter(None, [_told_change(found)])
    return f"{'; '.join(told)}."


def _told_words(found: Sequence[AttentionFound]) -> str:
    counts = _range([one.layout.own - 1 for one in found], "word token")
    return f"{_percent(_share(found, 'words'))} to {counts}, {_percent(_share(found, 'end_token'))} to the end token"


def _told_padding(found: Sequence[AttentionFound]) -> str:
    counts = [one.layout.padding for one in found]
    if not any(counts):
        return "no padding reaches the model"
    share = _over([one.padding_share for one in found])
    told = f"{_percent(share)} to {_range(counts, 'padding token')}"
    if not any(one.read for one in found):
        return f"{told}, none with more than an even share"
    told += f", {_mean_count([len(one.read) for one in found])} with more than an even share"
    edges = [_told_edge(found, region, which) for region, which in (("near", "first"), ("end", "last"))]
    return f"{told} ({', and '.join(filter(None, edges))})" if any(edges) else told


def _told_edge(found: Sequence[AttentionFound], region: str, which: str) -> str:
    name = f"padding_{region}"
    widths = [len(one.layout.regions.get(name, ())) for one in found]
    if not any(widths):
        return ""
    read = [sum(place in one.layout.regions.get(name, ()) for place in one.read) for one in found]
    return f"{_mean_count(read)} of the {which} {_range(widths)}, which get {_percent(_share(found, name))}"


def _told_change(found: Sequence[AttentionFound]) -> str:
    for name, what in (("padding_removed", "without its padding"), ("padding_added", "with padding put in")):
        here = [one for one in found if name in one.velocity]
        if not here:
            continue
        change, emptied = (
            _over([float(np.mean(one.velocity[each])) for one in here]) for each in (name, "prompt_emptied")
        )
        told = f"{what} the velocity changes by {_percent(change)} (with an empty prompt by {_percent(emptied)})"
        drawn = [one.pictures[name] for one in here if name in one.pictures]
        return f"{told} and the picture by {np.mean(drawn):.1f} of 255" if drawn else told
    return ""


def _share(found: Sequence[AttentionFound], region: str) -> float:
    return _over([one.share(region) for one in found])


def _over(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(counts: Sequence[int], noun: str = "") -> str:
    if min(counts) == max(counts):
        return counted(counts[0], noun) if noun else str(counts[0])
    return f"{min(counts)} to {max(counts)}{f' {noun}s' if noun else ''}"


def _mean_count(counts: Sequence[int]) -> str:
    mean = float(np.mean(counts))
    return f"{mean:.0f}" if mean.is_integer() else f"{mean:.1f}"


def _mean(values: Tensor, *over: int) -> np.ndarray:
    mean: np.ndarray = values.double().mean(dim=over).numpy()
    return mean


def _regions(values: np.ndarray, layout: TextLayout) -> dict[str, Any]:
    return {name: _values(values[:, places.start : places.stop].sum(axis=1)) for name, places in layout.regions.items()}


def _rounded(value: float) -> float:
    return float(f"{float(value):.{_DIGITS}g}")


def _values(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _values(value) for name, value in values.items()}
    if isinstance(values, np.ndarray):
        values = values.tolist()
    return [_values(value) for value in values] if isinstance(values, list | tuple) else _rounded(values)

"""The page of `libreflux inspect attention`: which text tokens are read, where in the picture, and what they change."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

import numpy as np
from PIL import Image

from libreflux import __version__
from libreflux.printing import shortened
from libreflux.probing.attention import KINDS
from libreflux.probing.attention_found import AttentionFound, sentence
from libreflux.probing.report import heat, html, plots

SIDE = 384
"""Pixels of a picture in the page, at most."""
NAMES = {
    "words": "words",
    "end_token": "end token",
    "padding_near": "padding: near",
    "padding_middle": "middle",
    "padding_end": "end",
    "image": "image",
}
READERS = {"image": "image tokens", "own": "the prompt's own tokens", "padding": "padding tokens"}
ALTERED = {
    "padding_removed": "all padding taken out",
    "padding_replaced": "padding of the empty prompt in its place",
    "padding_near_removed": "padding near the text taken out",
    "padding_middle_removed": "padding in the middle taken out",
    "padding_end_removed": "padding at the end taken out",
    "padding_added": "padding put in, as text padding keep has it",
    "prompt_emptied": "an empty prompt, for comparison",
}
WHAT_IT_IS = """
<p>In each block of FLUX every token shares out its attention, 100 % of it, over all tokens of the text and of
the image. These are the shares that text tokens get, recorded while the picture was drawn. <b>An even share</b> is what
each token would get if all got the same: a token above it is looked at. That a token is looked at does not yet mean
that it matters, so below the text is changed, and what becomes of the picture is measured.</p>"""


@dataclass(frozen=True, eq=False)
class PromptShown:
    """What the page shows of one prompt.

    Attributes:
        found: the numbers.
        picture: as it was drawn.
        where: token's place to [2, rows, columns], where it is read, by kind of block as of `attention.KINDS`.
        altered: name of an alteration to the picture drawn with it.
    """

    found: AttentionFound
    picture: Image.Image
    where: Mapping[int, np.ndarray]
    altered: Mapping[str, Image.Image]


def page(shown: Sequence[PromptShown], *, model: str, settings: Mapping[str, str]) -> str:
    """The whole page, self-contained: equal arguments give equal text, no script runs.

    Args:
        shown: of each prompt.
        model: what it is called.
        settings: how it was recorded, by name.
    """
    title = f"What does {model} look at?"
    rules, parts, numbers = [html.ATTENTION_STYLE], list[str](), count()
    for index, one in enumerate(shown):
        rules.append(_background(f"pic{index}", one.picture))
        parts.append(_prompt(one, index, numbers, rules, alone=len(shown) == 1))
    rows = html.table(("", ""), [list(row) for row in settings.items()], 2)
    body = (
        f"<style>{''.join(rules)}</style><h1>{escape(title)}</h1>"
        f'<p class="verdict">{escape(sentence([one.found for one in shown]))}</p>{WHAT_IT_IS}{heat.scale()}'
        f"{''.join(parts)}<h2>How it was recorded</h2>{rows}"
        f'<p class="faint">libreflux {__version__}</p>'
    )
    return html.document(title, body)


def _prompt(one: PromptShown, index: int, numbers: count[int], rules: list[str], *, alone: bool) -> str:
    found = one.found
    told = "" if alone else f"<p>{escape(sentence([found]))}</p>"
    return (
        f"<h2>“{escape(shortened(found.prompt, 300))}”</h2>{told}"
        f"{_tokens(one, index, numbers, rules)}{_strips(found)}{_who_reads_whom(found)}{_causal(one)}"
    )


def _tokens(one: PromptShown, index: int, numbers: count[int], rules: list[str]) -> str:
    """The strip of tokens; those that have a map are buttons that show it."""
    found, cells, inputs, maps = one.found, list[str](), list[str](), list[str]()
    for place, (text, share) in enumerate(zip(found.layout.tokens, found.tokens, strict=True)):
        times = float(share) / found.even
        colour = heat.colour(times)
        style = f"background: {heat.css(colour)}; color: {heat.ink(colour)}"
        kind = "own" if place < found.layout.own else "pad"
        shown = escape(text.replace("▁", " ").strip() or text)
        told = escape(f"token {place}: {text}, {times:.2f} times an even share")
        if place not in one.where:
            cells.append(f'<span class="{kind}" style="{style}" title="{told}">{shown}</span>')
            continue
        name = f"t{next(numbers)}"
        first = " checked" if not inputs else ""
        inputs.append(f'<input class="pick" type="radio" name="p{index}" id="{name}"{first}>')
        cells.append(f'<label class="{kind}" for="{name}" style="{style}" title="{told}">{shown}</label>')
        rules.append(f"#{name}:checked~.maps .{name}{{display:block}}")
        rules.append(f'#{name}:checked~.tokens [for="{name}"]{{outline:3px solid #1f6fb4}}')
        rules.append(f'#{name}:focus-visible~.tokens [for="{name}"]{{outline-offset:2px}}')
        maps.append(_map(one, index, place, name))
    return (
        "<h3>Which tokens image tokens read</h3>"
        '<p class="faint">Mean over steps, blocks and heads; narrow cells are padding. Choose a token with a frame, '
        f"then flip with the arrow keys: where in the picture it is read.</p>{''.join(inputs)}"
        f'<div class="tokens">{"".join(cells)}</div><div class="maps">{"".join(maps)}</div>'
    )


def _map(one: PromptShown, index: int, place: int, name: str) -> str:
    found, text = one.found, one.found.layout.tokens[place]
    own = "" if place < found.layout.own else ", padding"
    times = float(found.tokens[place]) / found.even
    cells = [f'<div><div class="over pic{index}"></div><small>the picture</small></div>']
    for kind, where in zip(KINDS, one.where[place], strict=True):
        if kind in found.kinds:
            low, high = (float(value) / found.even for value in (where.min(), where.max()))
            told = f"{kind} blocks: {low:.2f} to {high:.2f} times an even share"
            cells.append(f"<div>{heat.over(where, f'pic{index}', f'{text}, {told}')}<small>{told}</small></div>")
    head = escape(f"token {place}: “{text.replace('▁', ' ').strip() or text}”{own}, {times:.2f} times an even share")
    return f'<figure class="{name}"><figcaption>{head}</figcaption><div class="pair">{"".join(cells)}</div></figure>'


def _strips(found: AttentionFound) -> str:
    steps = [f"step {step + 1}" for step in range(len(found.sigmas))]
    blocks = [f"{kind} {_of_kind(found.kinds, number)}" for number, kind in enumerate(found.kinds)]
    wide, across = found.layout.own, "text token; the prompt's own are drawn wider"
    parts = [
        heat.strip(found.by_step / found.even, steps, title="By step", across=across, wide=wide, mark="padding"),
        heat.strip(found.by_block / found.even, blocks, title="By block", across=across, wide=wide, mark="padding"),
    ]
    what = "padding" if found.layout.padding else "words"
    regions = [name for name in found.layout.regions if name.startswith(what)]
    size = sum(len(found.layout.regions[name]) for name in regions)
    if size:
        times = np.sum([found.heads[name] for name in regions], axis=0) / size / found.even
        parts.append(heat.strip(times, blocks, title=f"By block and head, mean of the {what}", across="head"))
    return f"<h3>By step, block and head</h3>{''.join(parts)}"


def _of_kind(kinds: Sequence[str], number: int) -> int:
    return kinds[:number].count(kinds[number])


def _who_reads_whom(found: AttentionFound) -> str:
    names = list(found.readers["image"])
    heads = ("attention of", *(NAMES[name] for name in names))
    rows = [
        [READERS[reader], *(f"{100 * shares[name]:.2f} %" for name in names)]
        for reader, shares in found.readers.items()
    ]
    return f"<h3>Who reads whom</h3>{html.table(heads, rows, 1)}"


def _causal(one: PromptShown) -> str:
    found = one.found
    if not found.velocity:
        return ""
    rows = []
    for name, values in found.velocity.items():
        drawn = found.pictures.get(name)
        change = [f"{100 * value:.2f} %" for value in (float(np.mean(values)), values[0], values[-1])]
        rows.append([ALTERED[name], *change, "" if drawn is None else f"{drawn:.1f}"])
    heads = ("text", "velocity, mean", "first step", "last step", "picture, of 255")
    series = [
        plots.Series(ALTERED[name], number, _points(found.sigmas, values))
        for number, (name, values) in enumerate(_plotted(found.velocity))
    ]
    drawn_lines = plots.lines(
        series, title="Change of the velocity", x="noise level sigma (0 picture, 1 noise)", y="‖v′ − v‖ / ‖v‖, %"
    )
    pictures = [("as it was drawn", one.picture), *((ALTERED[name], image) for name, image in one.altered.items())]
    cells = "".join(
        f"<figure>{html.image(html.jpeg(image, SIDE, 88), told, 'jpeg')}<small>{escape(told)}</small></figure>"
        for told, image in pictures
    )
    return (
        "<h3>Does it matter?</h3><p>The same latents at each step, the same noise, another text. Velocity: "
        "‖v′ − v‖ / ‖v‖ without guidance. Picture: mean absolute difference of its values.</p>"
        f'{html.table(heads, rows, 1)}<div class="change">{drawn_lines}</div><div class="pair">{cells}</div>'
    )


def _points(sigmas: Sequence[float], values: Sequence[float]) -> list[tuple[float, float, float, float]]:
    percents = sorted((sigma, 100 * value) for sigma, value in zip(sigmas, values, strict=True))
    return [(sigma, percent, percent, percent) for sigma, percent in percents]


def _plotted(velocity: Mapping[str, tuple[float, ...]]) -> list[tuple[str, tuple[float, ...]]]:
    """Those that a figure has colours for; the replaced padding is in the table."""
    return [row for row in velocity.items() if row[0] != "padding_replaced"][: len(plots.DASHES)]


def _background(name: str, picture: Image.Image) -> str:
    data = base64.b64encode(html.jpeg(picture, SIDE, 85)).decode()
    shape = f"{picture.width} / {picture.height}"
    return f".{name}{{--shape:{shape};background-image:url(data:image/jpeg;base64,{data})}}"

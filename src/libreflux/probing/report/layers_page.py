"""The page of `inspect layers`: what each layer of a model does, by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from libreflux import __version__
from libreflux.adapter.difference import Change, together
from libreflux.adapter.targets import Resolved, group, summary
from libreflux.probing.layer_shares import block_of
from libreflux.probing.layers import SPANS, LayerTable
from libreflux.probing.report import html
from libreflux.probing.report.labels import number
from libreflux.probing.report.plots import Series, lines

PARTS = {
    "AdaLN": lambda name: ".norm" in name and name.endswith(".linear"),
    "attention": lambda name: ".attn." in name,
    "feed-forward": lambda name: True,
}
"""What a layer in a block is part of: the first that holds."""
_WHAT_IT_IS = """
<p>A FLUX model is a row of blocks: first <b>double</b> ones, in which text and picture have layers of their own, then
<b>single</b> ones, which both share (the dotted line is the border). Each block is given a vector for every token of
text and picture, and turns it a little. A block that hardly turns anything does little that the model would miss; the
angle does not say how well a block can be trained. So the gradient of each layer stands beside it, and what really
changed where there is a second model to compare with.</p>"""
_DEPTH = "block, in the order they compute in"


def headline(table: LayerTable, changes: Sequence[Change] = ()) -> str:
    """What was found, in a sentence or three."""
    turned = table.distance("image")
    order = np.argsort(turned, kind="stable")
    least, most = int(order[0]), int(order[-1])
    told = [
        f"Of {table.blocks} blocks, {table.block_name(least)} turns the picture's tokens least"
        f" ({number(float(turned[least]))} of a half turn) and {table.block_name(most)} most"
        f" ({number(float(turned[most]))})."
    ]
    gradients = _parts({name: table.gradient(name) ** 2 for name in table.gradients}, table)
    if whole := sum(gradients.values()):
        part = max(gradients, key=lambda name: gradients[name])
        told.append(f"The gradient is largest in the layers of {part}: {gradients[part] / whole:.0%} of its square.")
    by_part: dict[str, list[Change]] = {}
    for one in changes:
        if one.kind == "weight":
            by_part.setdefault(part_of(one.layer, table), []).append(one)
    if any(one.change for each in by_part.values() for one in each):
        part = max(by_part, key=lambda name: together(by_part[name]))
        told.append(f"What changed most, for its size, are the layers of {part} ({_percent(together(by_part[part]))}).")
    elif changes:
        told.append("No linear layer changed.")
    return " ".join(told)


def part_of(layer: str, table: LayerTable) -> str:
    """What a layer is part of: "AdaLN", "attention", "feed-forward", or "input and output" outside of all blocks."""
    if block_of(table, layer) is None:
        return "input and output"
    return next(part for part, holds in PARTS.items() if holds(layer))


def page(
    table: LayerTable, changes: Sequence[Change], layers: Sequence[Resolved], names: tuple[str, str], measure: str
) -> str:
    """The whole page.

    Args:
        table: what was measured.
        changes: of every tensor, to the second model; () without.
        layers: what a budget gives each layer; () without.
        names: of the model and of what it was compared with.
        measure: by which a budget was spent.
    """
    title = f"Which layers of {names[0]} matter?"
    spent_by_depth = _spent_by_depth(layers, table) if layers else ""
    spent = _adapter(layers, measure) if layers else ""
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f"<p><b>{escape(headline(table, changes))}</b></p>{_WHAT_IT_IS}",
            f'<h2>By depth</h2><div class="plots">{"".join(_plots(table, changes, names[1]))}{spent_by_depth}</div>',
            _redundant(table),
            _layer_table(table, changes),
            spent,
            f'<p class="faint">{table.pictures} pictures, each at noise levels'
            f" {', '.join(f'{sigma:g}' for sigma in table.sigmas)}. The text's last point is left out: nothing reads"
            f" what the last block makes of the text. libreflux {__version__}</p>",
        ]
    )
    return html.document(title, body)


def _plots(table: LayerTable, changes: Sequence[Change], after: str) -> list[str]:
    border = _border(table)
    angle = "angle, of a half turn"

    def drawn(title: str, y: str, series: Sequence[Series], *, percent: bool = False) -> str:
        return lines(series, title=title, x=_DEPTH, y=y, border=border, percent=percent)

    both = [
        Series(
            f"{tokens}{', centred' if is_centred else ''}",
            index,
            _points(table.distance(tokens, is_centred=is_centred)),
        )
        for index, (tokens, is_centred) in enumerate(
            [("image", False), ("image", True), ("text", False), ("text", True)]
        )
    ]
    found = [drawn("How far each block turns the tokens", angle, both)]
    for tokens in ("image", "text"):
        found.append(
            drawn(
                f"The same by noise level: {tokens}",
                angle,
                _by_sigma(table, lambda sigma, tokens=tokens: table.distance(tokens, sigma=sigma)),  # type: ignore[misc]
            )
        )
    spans = [span for span in SPANS if span <= table.blocks]
    rows = [
        Series(f"{span} blocks" if span > 1 else "1 block", i, _points(table.distance("image", span=span)))
        for i, span in enumerate(spans)
    ]
    found.append(drawn("How far several blocks in a row turn the image's tokens", angle, rows))
    found.append(
        drawn(
            "Gradient of each block's layers",
            "||dL/dW||",
            _by_sigma(table, lambda sigma: _block_gradients(table, sigma)),
        )
    )
    if any(one.change for one in changes):
        found.append(drawn(f"What changed to {after}", "||dW|| / ||W||", _changed(table, changes), percent=True))
    return found


def _by_sigma(table: LayerTable, values: Callable[[float], np.ndarray]) -> list[Series]:
    return [Series(f"sigma {sigma:g}", index, _points(values(sigma))) for index, sigma in enumerate(table.sigmas)]


def _points(values: Sequence[float] | np.ndarray) -> list[tuple[float, float, float, float]]:
    return [(float(at), float(value), float(value), float(value)) for at, value in enumerate(values)]


def _block_gradients(table: LayerTable, sigma: float) -> np.ndarray:
    squares = np.zeros(table.blocks)
    for name, values in table.gradients.items():
        if (block := block_of(table, name)) is not None:
            squares[block] += values[table.sigmas.index(sigma)] ** 2
    found: np.ndarray = np.sqrt(squares)
    return found


def _changed(table: LayerTable, changes: Sequence[Change]) -> list[Series]:
    found = []
    for index, part in enumerate(PARTS):
        rows: dict[int, list[Change]] = {}
        for one in changes:
            block = block_of(table, one.layer) if one.kind == "weight" else None
            if block is not None and part_of(one.layer, table) == part:
                rows.setdefault(block, []).append(one)
        points = [(float(block), *[together(each)] * 3) for block, each in sorted(rows.items())]
        found.append(Series(part, index, points))  # type: ignore[arg-type]
    return found


def _redundant(table: LayerTable) -> str:
    """Where pruning n blocks would begin, arXiv:2403.17887, algorithm of section 3.2."""
    rows = []
    for span in (span for span in SPANS if span <= table.blocks):
        for is_centred in (False, True):
            values = table.distance("image", span=span, is_centred=is_centred)
            first = int(np.argmin(values))
            blocks = (
                f"{table.block_name(first)} to {table.block_name(first + span - 1)}"
                if span > 1
                else table.block_name(first)
            )
            rows.append([str(span), "centred" if is_centred else "plain", blocks, number(float(values[first]))])
    heads = ("blocks in a row", "angle", "that turn the image's tokens least", "angle, of a half turn")
    return f"<h2>The most redundant blocks</h2>{html.table(heads, rows, 3)}"


def _layer_table(table: LayerTable, changes: Sequence[Change]) -> str:
    """Like layers of all blocks together."""
    changed: dict[str, list[Change]] = {}
    for one in changes:
        if one.kind == "weight":
            changed.setdefault(group(one.layer), []).append(one)
    squares: dict[str, list[float]] = {}
    for name in table.gradients:
        squares.setdefault(group(name), []).append(table.gradient(name) ** 2)
    whole = sum(map(sum, squares.values())) or 1.0
    weights: dict[str, int] = {}
    for name, (inner, outer) in table.sizes.items():
        weights[group(name)] = weights.get(group(name), 0) + inner * outer
    rows = [
        [
            name,
            f"{weights[name]:,}",
            number(math.sqrt(sum(each))),
            f"{sum(each) / whole:.1%}",
            *([_percent(together(changed[name]))] if changed else []),
        ]
        for name, each in sorted(squares.items(), key=lambda row: -sum(row[1]))
    ]
    heads = ("layer", "weights", "gradient", "of its square", *(["changed by"] if changed else []))
    return f"<h2>By kind of layer</h2>{html.table(heads, rows, 1)}"


def _adapter(layers: Sequence[Resolved], measure: str) -> str:
    kinds: dict[tuple[str, int | None], list[Resolved]] = {}
    for row in layers:
        kinds.setdefault((group(row.name), row.factor), []).append(row)
    rows = [
        [summary(row.name for row in each), str(factor), str(len(each)), f"{sum(row.parameters for row in each):,}"]
        for (_, factor), each in kinds.items()
    ]
    total = sum(row.parameters for row in layers)
    return (
        f"<h2>An adapter of {total:,} parameters</h2><p>Spent by the measure “{escape(measure)}”; the section"
        f" for a recipe is <code>adapter.yaml</code>, beside this page.</p>"
        f"{html.table(('layer', 'factor', 'count', 'parameters'), rows, 1)}"
    )


def _spent_by_depth(layers: Sequence[Resolved], table: LayerTable) -> str:
    sizes = np.zeros(table.blocks)
    spent = np.zeros(table.blocks)
    for name, (inner, outer) in table.sizes.items():
        if (block := block_of(table, name)) is not None:
            sizes[block] += inner * outer
    for row in layers:
        if (block := block_of(table, row.name)) is not None:
            spent[block] += row.parameters
    series = [Series("adapter", 0, _points(spent / sizes))]
    title = "The adapter's parameters, as a share of each block's weights"
    return lines(series, title=title, x=_DEPTH, y="parameters / weights", border=_border(table), percent=True)


def _border(table: LayerTable) -> float | None:
    return table.double - 0.5 if table.single else None


def _parts(values: Mapping[str, float], table: LayerTable) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        part = part_of(name, table)
        found[part] = found.get(part, 0.0) + value
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "from zero"

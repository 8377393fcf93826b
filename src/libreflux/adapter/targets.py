"""Which layer gets which LoKr factor, or a LoRA: ordered patterns over dotted names, whole-name match, first wins.

Grammar of a pattern: literal parts joined by dots; `*` stands for one part (inside a part, for any characters but a
dot); `**` for any number of parts, none included; `{0-7}` or `{1,3,8-11}` for exactly these whole numbers. There are no
other special characters: `[8-15]`, which fnmatch reads as one character of "8", "1-1", "5", is refused.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from libreflux.adapter.factors import lokr_shapes
from libreflux.errors import AdapterError
from libreflux.printing import counted

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of a recipe's `adapter.targets`."""

    layers: str
    """Pattern over dotted layer names."""
    factor: int | None = None
    """LoKr: size of the small Kronecker factor; -1: the most square split."""
    rank: int | None = None
    """LoRA: its rank. One of the two is given."""
    alpha: float | None = None
    """LoRA: numerator of the scale alpha / rank; None: rank."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What one layer of the model gets: a LoKr of matrices w1, w2, or, if it has a rank, a LoRA of up, down."""

    name: str
    factor: int | None
    in_features: int
    out_features: int
    w1: tuple[int, int]
    w2: tuple[int, int]
    parameters: int
    pattern: str
    rank: int | None = None
    alpha: float | None = None


def lokr_row(name: str, in_features: int, out_features: int, factor: int, pattern: str) -> Resolved:
    """A layer that gets a LoKr, by the pattern that says so."""
    w1, w2 = lokr_shapes(in_features, out_features, factor)
    return Resolved(
        name=name,
        factor=factor,
        in_features=in_features,
        out_features=out_features,
        w1=w1,
        w2=w2,
        parameters=math.prod(w1) + math.prod(w2),
        pattern=pattern,
    )


def lora_row(name: str, in_features: int, out_features: int, rank: int, alpha: float | None, pattern: str) -> Resolved:
    """A layer that gets a LoRA, by the pattern that says so."""
    return Resolved(
        name=name,
        factor=None,
        in_features=in_features,
        out_features=out_features,
        w1=(out_features, rank),
        w2=(rank, in_features),
        parameters=rank * (in_features + out_features),
        pattern=pattern,
        rank=rank,
        alpha=alpha,
    )


def _numbers(body: str, pattern: str) -> list[int]:
    """The integers of `0-7` or `1,3,8-11`, in order."""
    numbers: list[int] = []
    for item in body.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", item)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise AdapterError(
                f"{{{body}}} is not a list of whole numbers or rising ranges",
                where=f"pattern {pattern!r}",
                hint="write {0-7} or {1,3,8-11}",
            )
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers


def compile_pattern(pattern: str) -> tuple[re.Pattern[str], list[list[int]]]:
    """A regular expression for whole names, with one group per brace, and the numbers that each brace lists.

    Raises:
        AdapterError: the pattern breaks the grammar.
    """
    odd = re.sub(r"\{[^{}]*\}|[A-Za-z0-9_.*-]", "", pattern)
    parts = pattern.split(".") if not odd else []
    if odd or not pattern or "" in _BRACES.sub("0", pattern).split("."):
        raise AdapterError(
            f"cannot read {odd[0]!r} in it" if odd else "it has an empty part",
            where=f"pattern {pattern!r}",
            hint="use names, *, ** and integer ranges such as {0-7}",
        )
    # Two ** in a row say no more than one.
    parts = [part for index, part in enumerate(parts) if [part, *parts[index - 1 : index]] != ["**", "**"]]
    braces: list[list[int]] = []
    regex, glue = "", ""
    for index, part in enumerate(parts):
        if part == "**":
            last = index == len(parts) - 1
            if last:
                regex += r"(?:\.[^.]+)*" if regex and glue else r"(?:[^.]+\.)*[^.]+"
            else:
                regex += glue + r"(?:[^.]+\.)*"
                glue = ""
            continue
        if "**" in part:
            raise AdapterError("** stands only for whole parts", where=f"pattern {pattern!r}", hint="write a.**.b")
        piece, end = "", 0
        for brace in _BRACES.finditer(part):
            numbers = _numbers(brace[1], pattern)
            braces.append(numbers)
            piece += _literal(part[end : brace.start()]) + "(" + "|".join(map(str, numbers)) + ")"
            end = brace.end()
        regex += glue + piece + _literal(part[end:])
        glue = r"\."
    return re.compile(regex), braces


def _literal(text: str) -> str:
    return "[^.]*".join(map(re.escape, text.split("*"))) if text != "*" else "[^.]+"


def _shape(name: str) -> str:
    """A name or pattern with its numbers made `*`, so that near spellings are compared, not block numbers."""
    return _NUMBER.sub("*", _BRACES.sub("*", name))


def _near(pattern: str, names: Iterable[str]) -> str:
    shapes = list(dict.fromkeys(map(_shape, names)))
    near = difflib.get_close_matches(_shape(pattern), shapes, n=3, cutoff=0.3) or shapes[:3]
    return "near names: " + ", ".join(near)


def resolve(names_of_linears: Sequence[tuple[str, int, int]], targets: Sequence[Target]) -> list[Resolved]:
    """The layers that the patterns choose, in the model's order.

    Args:
        names_of_linears: (name, in_features, out_features) of every linear, e.g. from `layers.linear_shapes`.
        targets: ordered; the first pattern that matches a layer gives its factor.

    Raises:
        AdapterError: a pattern breaks the grammar, matches no linear, lists a number that matches none, or is wholly
            hidden by earlier ones.
    """
    if not targets:
        raise AdapterError("no targets: nothing would be trained", hint='add {layers: "**", factor: 8} to the targets')
    names = [name for name, _, _ in names_of_linears]
    owner: dict[str, Target] = {}
    for target in targets:
        where = f"pattern {target.layers!r}"
        regex, braces = compile_pattern(target.layers)
        matches = {name: match for name in names if (match := regex.fullmatch(name))}
        if not matches:
            raise AdapterError("matches no linear layer of this model", where=where, hint=_near(target.layers, names))
        for group, numbers in enumerate(braces, start=1):
            unused = sorted(set(numbers) - {int(match[group]) for match in matches.values()})
            if unused:
                hint = f"list only numbers the model has; {_near(target.layers, names)}"
                raise AdapterError(f"no layer has a number of {_ranges(unused)}", where=where, hint=hint)
        fresh = [name for name in matches if name not in owner]
        if not fresh:
            hiding = list(dict.fromkeys(owner[name].layers for name in matches))
            raise AdapterError(f"all it matches is taken by earlier {hiding}", where=where, hint="put it before them")
        owner |= dict.fromkeys(fresh, target)
    rows = []
    for name, in_features, out_features in names_of_linears:
        if name in owner:
            target = owner[name]
            if target.rank is not None:
                rows.append(lora_row(name, in_features, out_features, target.rank, target.alpha, target.layers))
            elif target.factor is not None:
                rows.append(lokr_row(name, in_features, out_features, target.factor, target.layers))
            else:
                raise AdapterError("has neither factor nor rank", where=f"pattern {target.layers!r}")
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs) + "}"


def group(name: str) -> str:
    """A layer's name with its block number open: `transformer_blocks.3.ff` -> `transformer_blocks.*.ff`."""
    return _NUMBER.sub("*", name, count=1)


def summary(names: Iterable[str]) -> str:
    """Names in brief: like layers of several blocks share one, with the numbers of the blocks in braces."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = _NUMBER.search(name)
        groups.setdefault(group(name), []).extend([int(number[0])] if number else [])
    return ", ".join(shape.replace("*", _ranges(numbers), 1) if numbers else shape for shape, numbers in groups.items())


def brief(resolved: Sequence[Resolved]) -> str:
    """The resolved layers in a few words: how many get which factor or rank, and their parameters."""
    kinds: dict[str, list[Resolved]] = {}
    for row in resolved:
        kind = f"lokr of factor {row.factor}" if row.rank is None else f"lora of rank {row.rank}"
        kinds.setdefault(kind, []).append(row)
    told = ", ".join(f"{kind} on {counted(len(rows), 'layer')}" for kind, rows in kinds.items())
    return f"{told}, {sum(row.parameters for row in resolved):,} parameters"


def table(resolved: Sequence[Resolved], width: int | None = None) -> str:
    """The resolved layers as aligned text: like layers of several blocks share a row, the total comes last.

    Args:
        resolved: in the model's order.
        width: characters that a line may have: the shapes of the factors are left out, then the layer's own, and names
            are cut, where it is less than they need. None: no limit.
    """
    lines = _lines(resolved)
    columns = list(range(len(lines[0])))
    for spare in (5, 4, 3):  # w2 or down, w1 or up, out x in
        if width is not None and _width(lines, columns) > width:
            columns.remove(spare)
    lines = [tuple(line[column] for column in columns) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    if width is not None:
        widths[0] = max(12, min(widths[0], width - sum(size + 2 for size in widths[1:])))
    return "\n".join(
        "  ".join(
            _shortened(cell, w).ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _width(lines: Sequence[Sequence[str]], columns: Sequence[int]) -> int:
    return sum(max(len(line[column]) for line in lines) + 2 for column in columns) - 2


def _shortened(name: str, width: int) -> str:
    """A name with its middle left out: its end says the layer, its beginning the kind of block."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def _lines(resolved: Sequence[Resolved]) -> list[tuple[str, ...]]:
    groups: dict[tuple[object, ...], list[Resolved]] = {}
    for row in resolved:
        groups.setdefault((_NUMBER.sub("#", row.name, count=1), row.factor, row.w1, row.w2), []).append(row)
    lora = bool(resolved) and resolved[0].rank is not None
    columns = ("rank", "up", "down") if lora else ("factor", "w1", "w2")
    lines: list[tuple[str, ...]] = [("layer", "count", columns[0], "out x in", *columns[1:], "parameters")]
    for (shape, *_), rows in groups.items():
        numbers = [int(match[0]) for row in rows if (match := _NUMBER.search(row.name))]
        first = rows[0]
        lines.append(
            (
                str(shape).replace("#", _ranges(numbers), 1) if len(rows) > 1 else first.name,
                str(len(rows)),
                str(first.rank or first.factor or ""),
                f"{first.out_features} x {first.in_features}",
                f"{first.w1[0]} x {first.w1[1]}",
                f"{first.w2[0]} x {first.w2[1]}",
                f"{sum(row.parameters for row in rows):,}",
            )
        )
    lines.append(("total", str(len(resolved)), "", "", "", "", f"{sum(row.parameters for row in resolved):,}"))
    return lines

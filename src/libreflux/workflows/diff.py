"""What changed from one model to another, layer by layer, and the change as an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux.errors import OptionError
from libreflux.places import new_place
from libreflux.workflows.compared import open_before, open_difference
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import check_whole
from libreflux.workflows.progress import Progress, Report, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from libreflux.adapter.difference import Change, Difference
    from libreflux.model.facts import Facts
    from libreflux.model.source import ModelSource

MOST_TERMS = 64


@dataclass(frozen=True)
class DiffOptions:
    """What is compared, and what is written of it.

    Attributes:
        before: a model: a name, a folder, a hub id or a single .safetensors file.
        after: what it became: another model, or an adapter as "PATH" or "PATH:WEIGHT".
        out: .safetensors file of the difference; with `terms` above 1 a folder of such files. It must not exist yet.
            None: the table alone.
        rank: of a LoRA that is written.
        factor: of a LoKr that is written; -1: the most square one.
        terms: Kronecker products that are summed, each in an adapter file of its own.
        device: what computes the factors: "auto", "cpu", "cuda", "cuda:N" or "mps".
        progress: shows how far it is.
    """

    before: str
    after: str
    _: KW_ONLY
    out: Path | str | None = None
    rank: int | None = None
    factor: int | None = None
    terms: int = 1
    device: str = "auto"
    progress: Progress = field(default=silent, repr=False, compare=False)


@dataclass(frozen=True)
class DiffResult:
    """What differs, and what was written of it.

    Attributes:
        before: name of the first model.
        after: name of the second, or of the adapter.
        changes: every tensor of the model, in its order.
        files: adapter files that were written, the largest part of the difference first.
        errors: of what was written, layer to ||difference − written|| / ||difference||; 0 is exact.
        parameters: numbers in the files.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    files: tuple[Path, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    parameters: int = 0

    @property
    def not_held(self) -> list[Change]:
        """What differs and no adapter can hold: biases, and weights of norms."""
        return [one for one in self.changes if one.change and one.kind != "weight"]

    @property
    def error(self) -> float:
        """Of all written layers together: ||difference − written|| / ||difference||."""
        written = [(self.errors[one.layer], one.change) for one in self.changes if _is_written(one, self.errors)]
        whole = math.sqrt(sum(change**2 for _, change in written))
        return math.sqrt(sum((error * change) ** 2 for error, change in written)) / whole if whole else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values; a relative change that is infinite is null."""
        return {
            "schema": 1,
            "before": self.before,
            "after": self.after,
            "tensors": [
                {
                    "name": one.name,
                    "kind": one.kind,
                    "shape": list(one.shape),
                    "norm": one.norm,
                    "change": one.change,
                    "relative": one.relative if math.isfinite(one.relative) else None,
                    **({"error": self.errors[one.layer]} if _is_written(one, self.errors) else {}),
                }
                for one in self.changes
            ],
            "files": [str(path) for path in self.files],
            "parameters": self.parameters,
        }


def _is_written(one: Change, errors: dict[str, float]) -> bool:
    return one.kind == "weight" and one.layer in errors


def diff_with(options: DiffOptions) -> DiffResult:
    """Tells what changed from one model to another, layer by layer; on request it writes the change as an adapter.

    The adapter is the one that is nearest to the difference in Frobenius norm: a LoRA by truncated singular values, a
    LoKr by the Kronecker product of Van Loan and Pitsianis. Memory holds one layer at a time.

    Raises:
        OptionError: an option that is missing, has no effect or is out of range, or models without a difference.
        RunError: `out` exists, or cannot be written.
        LibrefluxError: a model or an adapter that cannot be read, or models of other shapes.

    Example::

        import libreflux

        found = libreflux.diff("emoji-base", "emoji-schnell", rank=16, out="distillation.safetensors")
        for one in found.changes:
            print(one.name, one.relative)
        print(found.error)
    """
    _check(options)
    out = None if options.out is None else Path(options.out)
    if out is not None:
        new_place(out)

    from libreflux.model.device import pick_device

    device = pick_device(options.device)
    before = open_before(options.before, "before")
    difference, facts = open_difference(before, options.after)
    with options.progress("comparing", "tensor") as report:
        changes = tuple(difference.changes(report))
    if out is None:
        return DiffResult(options.before, options.after, changes)
    changed = [one for one in changes if one.kind == "weight" and one.change]
    if not changed:
        raise OptionError("there is nothing to write: no layer differs", "out", hint="compare other models")
    metadata = _metadata(options, before, facts)
    with options.progress("writing", "layer") as report:
        writer = _Writer(difference, changed, options, device, report)
        files = writer.write(out, metadata)
    return DiffResult(options.before, options.after, changes, files, writer.errors, writer.parameters)


def _check(options: DiffOptions) -> None:
    shapes = {"rank": options.rank, "factor": options.factor}
    given = [name for name, value in shapes.items() if value is not None]
    if options.out is None and (given or options.terms != 1):
        raise OptionError("has no effect without `out`", (given or ["terms"])[0], hint="name a file with `out`")
    if options.out is not None and len(given) != 1:
        raise OptionError("one of them is needed", "rank, factor", hint="write `rank` 64, or `factor` 4")
    if options.rank is not None:
        check_whole("rank", options.rank, 1)
        if options.terms != 1:
            raise OptionError("has no effect on a LoRA", "terms", hint="raise `rank`")
    if options.factor is not None and options.factor != -1:
        check_whole("factor", options.factor, 1)
    check_whole("terms", options.terms, 1, MOST_TERMS)
    if options.factor == 1 and options.terms != 1:
        raise OptionError("has no effect: at factor 1 one product is the whole difference", "terms", hint="remove it")
    if options.out is None:
        return
    is_file = Path(options.out).suffix == ".safetensors"
    if options.terms == 1 and not is_file:
        raise OptionError(f"{options.out} is no .safetensors file", "out", hint="let its name end in .safetensors")
    if options.terms != 1 and is_file:
        told = f"{options.out} is the name of a file, and {options.terms} terms are a folder of files"
        raise OptionError(told, "out", hint="leave .safetensors out")


def _metadata(options: DiffOptions, before: ModelSource, facts: Facts) -> dict[str, str]:
    """What the file says of itself: the model that it belongs on, and how the other one is used."""
    from libreflux import __version__

    return {
        "model": options.before,
        "model_hash": before.hash,
        "difference_to": options.after,
        "text_padding": facts.text_padding,
        "max_tokens": str(facts.max_tokens),
        "sampling_steps": str(facts.steps),
        "guidance": str(facts.guidance),
        "licence": facts.licence,
        "libreflux": __version__,
    }


class _Writer:
    """Computes the factors of one layer after another and writes each before the next is computed.

    Attributes:
        errors: layer to relative error.
        parameters: numbers that were written.
    """

    def __init__(
        self,
        difference: Difference,
        changed: list[Change],
        options: DiffOptions,
        device: torch.device,
        report: Report,
    ) -> None:
        self._difference, self._changed, self._options = difference, changed, options
        self._device, self._report = device, report
        self._done = 0
        self.errors: dict[str, float] = {}
        self.parameters = 0

    def write(self, out: Path, metadata: dict[str, str]) -> tuple[Path, ...]:
        """One file, or a folder with a file for each term."""
        from libreflux.files import staged_dir

        terms = self._options.terms
        if terms == 1:
            self._write_term(out, metadata, 0)
            return (out,)
        names = [f"term-{term + 1}.safetensors" for term in range(terms)]
        with staged_dir(out) as folder:
            for term, name in enumerate(names):
                self._write_term(folder / name, metadata, term)
        return tuple(out / name for name in names)

    def _write_term(self, path: Path, metadata: dict[str, str], term: int) -> None:
        import json

        import torch

        from libreflux.adapter.formats import lycoris_name
        from libreflux.adapter.io import SCHEMA
        from libreflux.model.stream import stream_safetensors

        layout = {
            f"{lycoris_name(one.layer)}.{suffix}": (torch.float32, shape)
            for one in self._changed
            for suffix, shape in self._shapes(one).items()
        }
        key_map = {lycoris_name(one.layer): one.layer for one in self._changed}
        told = {**metadata, "schema": SCHEMA, "key_map": json.dumps(key_map, sort_keys=True)}
        self.parameters += sum(math.prod(shape) for name, (_, shape) in layout.items() if not name.endswith(".alpha"))
        stream_safetensors(path, layout, self._tensors(term), told)

    def _shapes(self, one: Change) -> dict[str, tuple[int, ...]]:
        from libreflux.adapter.factors import lokr_shapes

        out_features, in_features = one.shape
        if self._options.factor is not None:
            w1, w2 = lokr_shapes(in_features, out_features, self._options.factor)
            return {"lokr_w1": w1, "lokr_w2": w2, "alpha": ()}
        rank = self._rank(one)
        return {"lora_down.weight": (rank, in_features), "lora_up.weight": (out_features, rank), "alpha": ()}

    def _rank(self, one: Change) -> int:
        assert self._options.rank is not None
        return min(self._options.rank, *one.shape)

    def _tensors(self, term: int) -> Iterator[tuple[str, Tensor]]:
        import torch

        from libreflux.adapter.formats import lycoris_name
        from libreflux.adapter.nearest import nearest_kroneckers, nearest_lora

        for one in self._changed:
            delta = self._difference.delta(one.name).to(self._device)
            if self._options.factor is not None:
                pairs = nearest_kroneckers(delta, self._options.factor, term + 1)
                w1, w2 = pairs[term] if term < len(pairs) else tuple(torch.zeros_like(each) for each in pairs[0])
                made, alpha = {"lokr_w1": w1, "lokr_w2": w2}, 1.0
                lacking = delta
                for left, right in pairs:
                    lacking = lacking - torch.kron(left, right)
            else:
                up, down = nearest_lora(delta, self._rank(one))
                made, alpha = {"lora_down.weight": down, "lora_up.weight": up}, float(self._rank(one))
                lacking = delta - up @ down
            self.errors[one.layer] = float(torch.linalg.vector_norm(lacking)) / one.change
            for suffix, tensor in {**made, "alpha": torch.tensor(alpha)}.items():
                yield f"{lycoris_name(one.layer)}.{suffix}", tensor
            self._done += 1
            self._report(self._done, self._options.terms * len(self._changed))


diff = by_keywords(DiffOptions, diff_with)

"""Reading `lycoris_config.json`: which layer gets what under LyCORIS' own rules, said layer by layer.

The rules of lycoris-lora 4.1, restated. The modules of the model are walked from the root down; the first that takes a
layer keeps it:
- A module whose class is in `target_module` or `module_algo_map`, and whose name no name pattern matches, gives all
  linears below it its class's entry; a module inside of it whose class has an entry of its own uses that one.
- Any other module whose name a pattern of `target_name` or `name_algo_map` matches gets the entry of the first such
  pattern: with `use_fnmatch`, the whole name in shell style, else a regular expression from the start of the name.
- A module whose name an `exclude_name` matches is passed over, but not what is below it.
Ranges such as `[8-15]` are sets of single characters in both styles, which is why the table of matches is printed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from libreflux import plainjson
from libreflux.adapter.factors import lokr_shapes
from libreflux.adapter.targets import Resolved, lokr_row, lora_row, summary
from libreflux.errors import AdapterError

READ = {"algo", "factor", "full_matrix"}
ROOT_KEYS = READ | {"multiplier", "linear_dim", "linear_alpha", "apply_preset", "init_lokr_norm", "bypass_mode"}
ENTRY_KEYS = READ | {"dim", "alpha"}
PRESET_KEYS = {"target_module", "target_name", "module_algo_map", "name_algo_map", "use_fnmatch", "exclude_name"}
IDLE = {"conv_dim", "conv_alpha", "block_size", "wd_on_output", "use_tucker", "enable_conv"}
"""Without effect on a linear layer's LoKr or LoRA."""
ALGOS = {"lokr": "lokr", "lora": "lora", "locon": "lora"}
CLASSES = ("Linear",)
"""LyCORIS' own `target_module` when a file gives none; its convolutions and norms are nothing to us."""


@dataclass(frozen=True)
class Match:
    """One pattern or class of a config.

    Attributes:
        rule: `class`, `fnmatch`, `regex` or `exclude`.
        key: as written.
        layers: names of the linears that it took, in the model's order.
    """

    rule: str
    key: str
    layers: tuple[str, ...]


def read_config(path: Path | str) -> dict[str, Any]:
    """A lycoris_config.json, checked for what is not supported here.

    Raises:
        AdapterError: no such file, no JSON object, or a key that would be ignored.
    """
    try:
        config = plainjson.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot be read as JSON ({error})", where=path) from None
    if not isinstance(config, dict):
        raise AdapterError("is not an object of keys and values", where=path)
    _check(config, ROOT_KEYS, str(path))
    preset = config.get("apply_preset", {})
    _check(preset, PRESET_KEYS, f"{path}, apply_preset")
    for table in ("module_algo_map", "name_algo_map"):
        for key, entry in preset.get(table, {}).items():
            where = f"{path}, {table}, {key!r}"
            for idle, heeded in (("linear_dim", "dim"), ("linear_alpha", "alpha")):
                if idle in entry:
                    raise AdapterError(f"LyCORIS ignores {idle} in an entry", where=where, hint=f"write {heeded}")
            _check(entry, ENTRY_KEYS, where)
    if config.get("multiplier", 1) != 1:
        raise AdapterError("multiplier is not supported", where=path, hint="set it to 1; weigh the adapter when used")
    return config


def _check(section: Any, known: set[str], where: str) -> None:
    if not isinstance(section, dict):
        raise AdapterError("is not an object of keys and values", where=where)
    for key, value in section.items():
        if key not in known | IDLE and value not in (False, 0, None):
            hint = f"remove it; read are {', '.join(sorted(known))}"
            raise AdapterError(f"{key} is not supported", where=where, hint=hint)


def assign(config: Mapping[str, Any], transformer: nn.Module, where: str) -> tuple[list[Resolved], list[Match]]:
    """What a config gives to a model's linears.

    Args:
        config: from `read_config`.
        transformer: the model, on any device.
        where: the file, for errors.

    Returns:
        The adapted layers in the model's order, and what each entry took, in the file's order.

    Raises:
        AdapterError: an entry matches no linear of the model, or gives a layer what is not supported.
    """
    walk = _Walk(config.get("apply_preset", {}), where)
    walk.run(transformer)
    rows = []
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name in walk.taken:
            key, algo, entry = walk.taken[name]
            rows.append(_row(name, module, key, algo, entry, config, where))
    taken = [(name, key) for name, (key, _, _) in walk.taken.items()]
    matches = [Match(rule, key, tuple(name for name, owner in taken if owner == key)) for rule, key in walk.entries()]
    silent = [match.key for match in matches if match.key not in walk.touched | walk.unwritten]
    if silent:
        classes = sorted({type(module).__name__ for module in transformer.modules() if list(module.children())})
        hint = f"remove them or hint them; this model has the classes {', '.join(classes)}"
        raise AdapterError(f"match no linear of this model: {', '.join(map(repr, silent))}", where=where, hint=hint)
    if not rows:
        raise AdapterError("matches no linear layer of this model", where=where, hint="name a target_module")
    return rows, matches


def table(matches: list[Match]) -> str:
    """What each entry took, as text: like layers of several blocks share a name."""
    lines = [f"{match.rule:8} {match.key:40} {len(match.layers):5}  {summary(match.layers)}" for match in matches]
    return "\n".join([f"{'rule':8} {'entry of lycoris_config':40} {'takes':>5}  layers", *lines])


class _Walk:
    """The rules at the head of this file; `taken`: layer -> (entry's key, algo or None, entry)."""

    def __init__(self, preset: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.by_class: dict[str, dict[str, Any]] = preset.get("module_algo_map", {})
        self.by_name: dict[str, dict[str, Any]] = preset.get("name_algo_map", {})
        self.unwritten: set[str] = set() if "target_module" in preset else set(CLASSES)
        self.classes = list(dict.fromkeys([*preset.get("target_module", CLASSES), *self.by_class]))
        self.names = list(dict.fromkeys([*self.by_name, *preset.get("target_name", [])]))
        self.excluded: list[str] = preset.get("exclude_name", [])
        self.shell = bool(preset.get("use_fnmatch", False))
        self.taken: dict[str, tuple[str, str | None, dict[str, Any]]] = {}
        self.touched: set[str] = set()
        if not self.shell:
            for pattern in [*self.names, *self.excluded]:
                self._compile(pattern)

    def entries(self) -> list[tuple[str, str]]:
        """(rule, key) of everything that a file may have written."""
        style = "fnmatch" if self.shell else "regex"
        return [
            *(("class", key) for key in self.classes),
            *((style, key) for key in self.names),
            *(("exclude", key) for key in self.excluded),
        ]

    def run(self, root: nn.Module) -> None:
        for name, module in root.named_modules():
            if self._skips(name, module):
                continue
            kind = type(module).__name__
            pattern = next((pattern for pattern in self.names if self._matches(pattern, name)), None)
            if kind in self.classes and pattern is None:
                self._fill(module, name, kind, None)
            elif name in self.names or pattern is not None:
                key = name if name in self.names else str(pattern)
                entry = self.by_name.get(key, self.by_class.get(kind, {}))
                if isinstance(module, nn.Linear):
                    self.touched |= {one for one in self.names if one == name or self._matches(one, name)}
                    self.taken.setdefault(name, (key, entry.get("algo"), entry))

    def _fill(self, block: nn.Module, path: str, key: str, inherited: str | None) -> None:
        entry = self.by_class.get(key, {})
        algo = entry.get("algo", inherited)
        self.touched.add(key)
        for name, module in block.named_modules():
            full = ".".join(part for part in (path, name) if part)
            kind = type(module).__name__
            if self._skips(full, module):
                continue
            if kind in self.by_class and module is not block:
                self._fill(module, full, kind, algo)
            elif isinstance(module, nn.Linear) and full not in self.taken:
                self.taken[full] = (key, algo, entry)

    def _skips(self, name: str, module: nn.Module) -> bool:
        hit = {pattern for pattern in self.excluded if name and (pattern == name or self._matches(pattern, name))}
        if isinstance(module, nn.Linear) or type(module).__name__ in self.classes:
            self.touched |= hit
        return bool(hit)

    def _matches(self, pattern: str, name: str) -> bool:
        return fnmatch.fnmatch(name, pattern) if self.shell else bool(self._compile(pattern).match(name))

    def _compile(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            hint = r"write the numbers out, as in transformer_blocks\.(8|9|1[0-5])\."
            where = f"{self.where}, {pattern!r}"
            raise AdapterError(f"is no regular expression ({error})", where=where, hint=hint) from None


def _row(
    name: str,
    linear: nn.Linear,
    key: str,
    algo: str | None,
    entry: Mapping[str, Any],
    root: Mapping[str, Any],
    where: str,
) -> Resolved:
    kind = ALGOS.get(str(algo or root.get("algo") or "lora").lower())
    dim = int(entry.get("dim") or root.get("linear_dim") or 4)
    where = f"{where}, {key!r}"
    if kind == "lora":
        alpha = float(entry.get("alpha") or root.get("linear_alpha", 1))
        return lora_row(name, linear.in_features, linear.out_features, dim, alpha, key)
    if kind is None:
        hint = f"use one of {', '.join(ALGOS)}"
        raise AdapterError(f"algo {algo or root.get('algo')!r} is not supported", where=where, hint=hint)
    factor = int(entry.get("factor", root.get("factor", -1)))
    full = entry.get("full_matrix", root.get("full_matrix", False))
    _, shape = lokr_shapes(linear.in_features, linear.out_features, factor)
    if not full and dim < max(shape) / 2:
        hint = "set full_matrix: true, or a linear_dim of 10000"
        raise AdapterError(f"a low-rank LoKr (dim {dim}) on {name} is not trained here", where=where, hint=hint)
    return lokr_row(name, linear.in_features, linear.out_features, factor, key)

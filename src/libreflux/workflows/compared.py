"""What a model is compared with, as users name it: a second model, or an adapter with its weight."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux.errors import OptionError
from libreflux.values import adapter_argument
from libreflux.workflows.adapters import adapted_facts, adapter_file, check_base
from libreflux.workflows.export import is_adapter

if TYPE_CHECKING:
    from libreflux.adapter.difference import Difference
    from libreflux.model.facts import Facts
    from libreflux.model.source import ModelSource


def open_difference(before: ModelSource, other: str) -> tuple[Difference, Facts]:
    """The difference from a model to another one, or to itself under an adapter, and how that is used.

    Args:
        before: the model.
        other: a model, or an adapter as "PATH" or "PATH:WEIGHT".

    Raises:
        LibrefluxError: what is named cannot be read, or does not go together.
    """
    from libreflux.adapter.difference import AdapterDifference, ModelDifference
    from libreflux.adapter.io import load_adapter
    from libreflux.model.opening import open_model
    from libreflux.model.weight_reader import weight_reader
    from libreflux.workflows.model_options import chosen_model

    path, weight = (other, 1.0) if os.path.lexists(other) else adapter_argument(other)
    if is_adapter(path):
        file = load_adapter(adapter_file(Path(os.path.expanduser(path))))
        check_base(before, before.hash, [(file, weight)])
        return AdapterDifference(weight_reader(before), file, weight), adapted_facts(before.facts, [(file, weight)])
    named = chosen_model(other, None, None)
    assert named is not None
    after = open_model(named)
    return ModelDifference(weight_reader(before), weight_reader(after)), after.facts


def open_before(name: str, option: str, base: str | None = None, comfyui: Path | None = None) -> ModelSource:
    """The model that is looked into.

    Args:
        name: as the user names it.
        option: where, for errors.
        base, comfyui: see `model_options.chosen_model`.

    Raises:
        OptionError: an adapter stands in its place.
        LibrefluxError: it cannot be read.
    """
    from libreflux.model.opening import open_model
    from libreflux.workflows.model_options import chosen_model

    if is_adapter(name):
        raise OptionError(f"{name} is an adapter", option, hint="name a model here, and the adapter after it")
    chosen = chosen_model(name, base, comfyui)
    assert chosen is not None
    return open_model(chosen)

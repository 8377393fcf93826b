"""Which model the options `model`, `base` and `comfyui` name together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux.errors import ModelError, OptionError
from libreflux.places import did_you_mean

if TYPE_CHECKING:
    from libreflux.model.single_file import SingleFiles


def chosen_model(model: str | None, base: str | None, comfyui: Path | None) -> str | SingleFiles | None:
    """What the options together name; None where none of them is given.

    Raises:
        OptionError: an option that has no effect.
        ModelError: no such files.
    """
    for name, given in (("model", model), ("base", base)):
        if given == "":
            raise OptionError("is empty", name, hint="name a model, or leave it out")
    file = Path(os.path.expanduser(model)) if model is not None and model.lower().endswith(".safetensors") else None
    if file is not None and not file.is_file():
        raise ModelError("no such file", where=model, hint=did_you_mean(file, "correct the path"))
    if base is not None and file is None and comfyui is None:
        hint = "remove it, or name a .safetensors file with `model`"
        raise OptionError("has no effect without a single file", "base", hint=hint)
    if comfyui is not None and model is not None and file is None:
        raise OptionError(f"has no effect beside {model}", "comfyui", hint="remove one of the two")
    if comfyui is not None:
        from libreflux.model.single_file import find_comfyui

        return find_comfyui(Path(os.path.expanduser(comfyui)), transformer=file, base=base)
    if file is None:
        return model

    from libreflux.model.single_file import SingleFiles

    return SingleFiles(transformer=file, base=base)

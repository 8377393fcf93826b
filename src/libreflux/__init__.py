"""libreflux: sets distilled FLUX models free, and trains, merges, measures and samples what comes of it.

    import libreflux

    pipe = libreflux.LibreFluxPipeline.from_pretrained("emoji-base")
    pipe("a red apple on blue", guidance_scale=3, seeds=[1]).images[0].save("apple.png")

What a command does is a function here too. It prints nothing, and what it made is in what it returns:

    libreflux.generate("a red apple on blue", model="emoji-base", out="apple.png")
    libreflux.remake("apple.png", out="again.png")
    libreflux.grid(["a red apple on blue"], guidance=[1, 3], out="sheet")
    libreflux.train(libreflux.Recipe(model="emoji-schnell", data=[{"path": "pictures"}], out="runs/mine"))
    libreflux.average("runs/mine", width=0.1, out="mine.safetensors")
    libreflux.merge("emoji-schnell", adapters=["runs/mine"], out="models/mine")
    libreflux.probe("models/mine", against="emoji-schnell", quick=True)
    libreflux.export("models/mine", program="diffusers", out="for-diffusers")

    pipe.load_lora_weights(libreflux.load_adapter("runs/mine"), weight=0.8)
    libreflux.open_model("models/mine").facts

Importing this package loads no torch; each of these names comes in when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libreflux.model.source import open_model
    from libreflux.recipe import Recipe
    from libreflux.sample.pipeline import LibreFluxPipeline
    from libreflux.workflows.adapters import load_adapter
    from libreflux.workflows.average import average
    from libreflux.workflows.export import export
    from libreflux.workflows.generate import generate
    from libreflux.workflows.grid import grid
    from libreflux.workflows.merge import merge
    from libreflux.workflows.probe import probe
    from libreflux.workflows.remake import remake
    from libreflux.workflows.train import train

__version__ = "0.1.0"
__all__ = [
    "LibreFluxPipeline",
    "Recipe",
    "__version__",
    "average",
    "export",
    "generate",
    "grid",
    "load_adapter",
    "merge",
    "open_model",
    "probe",
    "remake",
    "train",
]

_LAZY = {
    "LibreFluxPipeline": "libreflux.sample.pipeline",
    "Recipe": "libreflux.recipe",
    "average": "libreflux.workflows.average",
    "export": "libreflux.workflows.export",
    "generate": "libreflux.workflows.generate",
    "grid": "libreflux.workflows.grid",
    "load_adapter": "libreflux.workflows.adapters",
    "merge": "libreflux.workflows.merge",
    "open_model": "libreflux.model.source",
    "probe": "libreflux.workflows.probe",
    "remake": "libreflux.workflows.remake",
    "train": "libreflux.workflows.train",
}
"""Name to the module that has it."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

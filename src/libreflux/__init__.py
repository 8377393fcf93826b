"""libreflux: sets distilled FLUX models free, and trains, merges and samples what comes of it.

    import libreflux

    pipe = libreflux.LibreFluxPipeline.from_pretrained("emoji-base")
    pipe("a red apple on blue", guidance_scale=3, seeds=[1]).images[0].save("apple.png")
    libreflux.generate("a fox on yellow", adapters=["runs/first:0.8"], out="fox.png")

Importing this package loads no torch; each of its names comes in when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libreflux.model.source import open_model
    from libreflux.sample.pipeline import LibreFluxPipeline
    from libreflux.workflows.generate import generate
    from libreflux.workflows.grid import grid
    from libreflux.workflows.remake import remake

__version__ = "0.1.0"
__all__ = ["LibreFluxPipeline", "__version__", "generate", "grid", "open_model", "remake"]

_LAZY = {
    "LibreFluxPipeline": "libreflux.sample.pipeline",
    "generate": "libreflux.workflows.generate",
    "grid": "libreflux.workflows.grid",
    "open_model": "libreflux.model.source",
    "remake": "libreflux.workflows.remake",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

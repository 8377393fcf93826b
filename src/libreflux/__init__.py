"""libreflux: sets distilled FLUX models free, and trains, merges, measures and samples what comes of it.

    import libreflux

    pipe = libreflux.LibreFluxPipeline.from_pretrained("emoji-base")
    pipe("a red apple on blue", guidance_scale=3, seeds=[1]).images[0].save("apple.png")

What a command does is a function here too. It prints nothing, and what it made is in what it returns:

    libreflux.demo_data("pictures", count=400)
    libreflux.caption("pictures", model="my-vlm")
    libreflux.dry_run("mine.yaml")
    libreflux.prepare("mine.yaml")
    libreflux.train("mine.yaml")
    libreflux.average("runs/mine", width=0.1, out="mine.safetensors")
    libreflux.sweep("runs/mine", data="apart", out="best.safetensors")
    libreflux.merge("emoji-schnell", ["runs/mine"], out="models/mine")
    libreflux.generate("a red apple on blue", model="models/mine", out="apple.png")
    libreflux.generate_folder("prompts.txt", count=400, out="drawn")
    libreflux.remake("apple.png", out="again.png")
    libreflux.grid(["a red apple on blue"], guidance=[1, 3], out="sheet")
    libreflux.probe("models/mine", against="emoji-schnell", quick=True)
    libreflux.probe_few_steps("emoji-schnell", adapters="runs/mine", data="pictures", prompts="others.txt")
    libreflux.inspect_attention("models/mine", "a red apple on blue", text_padding="keep")
    libreflux.inspect_layers("emoji-schnell", against="models/mine", budget="400k")
    libreflux.diff("emoji-schnell", "models/mine", rank=16, out="difference.safetensors")
    libreflux.export("models/mine", program="diffusers", out="for-diffusers")
    libreflux.demo()

Models, adapters and recipes for code of your own:

    libreflux.open_model("models/mine").facts
    pipe.load_lora_weights(libreflux.load_adapter("runs/mine"), weight=0.8)
    libreflux.Recipe.model_validate({"model": "emoji-schnell", "data": [{"path": "pictures"}], "resolution": 64})

Importing this package loads no torch; each of these names comes in when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libreflux.model.opening import open_model
    from libreflux.recipe import Recipe
    from libreflux.sample.pipeline import LibreFluxPipeline
    from libreflux.workflows.adapters import load_adapter
    from libreflux.workflows.average import average
    from libreflux.workflows.caption import caption
    from libreflux.workflows.demo import demo
    from libreflux.workflows.demo_data import demo_data
    from libreflux.workflows.diff import diff
    from libreflux.workflows.dry_run import dry_run
    from libreflux.workflows.export import export
    from libreflux.workflows.few_steps import probe_few_steps
    from libreflux.workflows.generate import generate
    from libreflux.workflows.generate_folder import generate_folder
    from libreflux.workflows.grid import grid
    from libreflux.workflows.inspect_attention import inspect_attention
    from libreflux.workflows.inspect_layers import inspect_layers
    from libreflux.workflows.merge import merge
    from libreflux.workflows.prepare import prepare
    from libreflux.workflows.probe import probe
    from libreflux.workflows.remake import remake
    from libreflux.workflows.sweep import sweep
    from libreflux.workflows.train import train

__version__ = "0.2.0.dev0"
__all__ = [
    "LibreFluxPipeline",
    "Recipe",
    "__version__",
    "average",
    "caption",
    "demo",
    "demo_data",
    "diff",
    "dry_run",
    "export",
    "generate",
    "generate_folder",
    "grid",
    "inspect_attention",
    "inspect_layers",
    "load_adapter",
    "merge",
    "open_model",
    "prepare",
    "probe",
    "probe_few_steps",
    "remake",
    "sweep",
    "train",
]

_LAZY = {
    "LibreFluxPipeline": "libreflux.sample.pipeline",
    "Recipe": "libreflux.recipe",
    "average": "libreflux.workflows.average",
    "caption": "libreflux.workflows.caption",
    "demo": "libreflux.workflows.demo",
    "demo_data": "libreflux.workflows.demo_data",
    "diff": "libreflux.workflows.diff",
    "dry_run": "libreflux.workflows.dry_run",
    "export": "libreflux.workflows.export",
    "generate": "libreflux.workflows.generate",
    "generate_folder": "libreflux.workflows.generate_folder",
    "grid": "libreflux.workflows.grid",
    "inspect_attention": "libreflux.workflows.inspect_attention",
    "inspect_layers": "libreflux.workflows.inspect_layers",
    "load_adapter": "libreflux.workflows.adapters",
    "merge": "libreflux.workflows.merge",
    "open_model": "libreflux.model.opening",
    "prepare": "libreflux.workflows.prepare",
    "probe": "libreflux.workflows.probe",
    "probe_few_steps": "libreflux.workflows.few_steps",
    "remake": "libreflux.workflows.remake",
    "sweep": "libreflux.workflows.sweep",
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

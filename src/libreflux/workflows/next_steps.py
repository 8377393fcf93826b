"""What a finished run says: that it is finished, and commands to go on with."""

from __future__ import annotations

import os
from pathlib import Path

from libreflux.printing import quoted_command
from libreflux.recipe import Recipe
from libreflux.training.checkpoint import ADAPTER
from libreflux.training.run_state import all_done

PROMPT = "a red apple on blue"


def finished(recipe: Recipe, started_at: int | None) -> str:
    """One line.

    Args:
        recipe: the run's.
        started_at: finished steps when this process began to train; None: it had nothing to do.
    """
    if started_at is None:
        return f"this run was finished before: {all_done(recipe.steps)}; raise steps to go on"
    use = ""
    if recipe.adapter.role == "training_adapter":
        use = f"; to train with it, write adapter.training_adapter: {os.path.join(recipe.out, ADAPTER)} in a recipe"
    return f"finished: {all_done(recipe.steps)}{use}"


def commands(recipe: Recipe) -> list[str]:
    """Commands that work when they are pasted into a shell, in the folder where the training was started."""
    run = _named(recipe.out)
    if recipe.adapter.role == "training_adapter":  # no command draws with it: what it is for stands in a recipe
        return [quoted_command(["libreflux", "recipe", "adapter.training_adapter"])]
    model, adapter = _named(recipe.model), run
    if ":" in adapter:  # what follows would be read as a weight
        adapter = os.path.join(run, "adapter.safetensors")
    prompt = next((one for one in recipe.samples.prompts if one.strip()), PROMPT)
    drawn = ["generate", "--model", model, "--adapter", adapter, "--out", _free(run, "-drawn", ".png")]
    found = [[*drawn, *(["--"] if prompt.startswith("-") else []), prompt]]
    if recipe.ema:
        width = recipe.ema[-1]
        found.append(["average", run, "--width", f"{width:g}", "--out", _free(run, "-averaged", ".safetensors")])
    found.append(["merge", model, adapter, "--out", _free(run, "-merged")])
    return [quoted_command(["libreflux", *words]) for words in found]


def _named(path: str) -> str:
    """A path that no option parser takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _free(run: str, ending: str, suffix: str = "") -> str:
    """A name beside the run folder that is not taken."""
    path = Path(run)
    if not path.name or path.name == "..":
        path = Path(os.path.abspath(run))
    name, number = f"{path.name}{ending}", 1
    while os.path.lexists(path.with_name(f"{name}{suffix}")):
        number += 1
        name = f"{path.name}{ending}-{number}"
    return _named(str(path.with_name(f"{name}{suffix}")))

"""Pictures and captions encoded once, before or without training. Light: torch comes with the work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux.errors import OptionError
from libreflux.processes import own_rank
from libreflux.recipe import Recipe, load_recipe
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.progress import Progress, silent
from libreflux.workflows.recipes import RecipeArgument, resolve_recipe

if TYPE_CHECKING:
    from libreflux.data.summary import SourceSummary


@dataclass(frozen=True)
class PrepareOptions:
    """What is encoded, and how. None of model, resolution and what else a recipe says is given beside a recipe.

    Attributes:
        data: folders of captioned pictures; or one recipe, the path of its file (.yaml), or a tree of its keys.
        out: the cache folder, written or continued; a recipe names its own.
        model: whose VAE and text encoders are used; None: emoji-base.
        resolution: sides of the crops in pixels; None: 128.
        crop: "square", "aspect", "centre"; None: square.
        text_padding: "drop" or "trim"; None: drop.
        text_cache: "bf16"; "int8", half the disk; "none": captions are encoded while training. None: bf16.
        text_precision: what the text encoders compute in: "auto", "fp32" or "bf16"; None: auto, bf16 on a card.
        latents: "mean", or "sample": the standard deviation too, to draw from in training. None: mean.
        crops_per_picture: cached crops of each picture; None: 1.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps": where the encoders run; None: auto.
        background: colour laid under transparent pictures; None: white.
        shard: "i/n": the i-th of n parts alone, "1/n" to "n/n"; None: under torchrun this process's own, else all.
        on_source: called with what each source turned out to hold, before anything is encoded.
        progress: shows how far checking and encoding are.
    """

    data: RecipeArgument | Sequence[Path | str]
    _: KW_ONLY
    out: Path | str | None = None
    model: str | None = None
    resolution: Sequence[int] | None = None
    crop: Sequence[str] | None = None
    text_padding: str | None = None
    text_cache: str | None = None
    text_precision: str | None = None
    latents: str | None = None
    crops_per_picture: int | None = None
    device: str | None = None
    background: str | None = None
    shard: str | None = None
    on_source: Callable[[SourceSummary], None] | None = field(default=None, repr=False, compare=False)
    progress: Progress = field(default=silent, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What is there now.

    Attributes:
        cache: its folder; a recipe finds it by `cache:`.
        pictures: usable ones, of this part.
        part: (i, n): the i-th of n parts, from 0; (0, 1) is all.
    """

    cache: Path
    pictures: int
    part: tuple[int, int]


_OF_A_SOURCE = ("crops_per_picture", "background")
_OF_A_RECIPE = (
    "model",
    "resolution",
    "crop",
    "text_padding",
    "text_cache",
    "text_precision",
    "latents",
    "device",
    *_OF_A_SOURCE,
)


def prepare_with(options: PrepareOptions) -> PrepareResult:
    """Encode pictures and captions once; called again, it continues or finds nothing left to do.

    Raises:
        OptionError: an option that the recipe says itself, or no cache folder.
        RecipeError: the recipe, or a value that none may have.
        DataError, ModelError, RunError: see `data.prepare.prepare`.

    Example::

        import libreflux

        libreflux.demo_data("pictures", count=8)
        print(libreflux.prepare("pictures", resolution=[64], out="cache").pictures)  # 8
    """
    recipe, part = recipe_of_options(options), parse_part(options.shard)

    from libreflux.data.prepare import prepare_cache
    from libreflux.model.device import make_current, pick_device
    from libreflux.model.device_faults import explained

    device = str(pick_device(recipe.device))
    smaller = "a smaller resolution, or device: cpu"
    with options.progress("preparing", "item") as report, explained(f"preparing on {device}", smaller):
        make_current(device)
        _, sources = prepare_cache(
            recipe, device=device, part=part, progress=report, told=options.on_source, read_all=True
        )
    return PrepareResult(cache=recipe.cache_dir, pictures=sum(len(samples) for _, samples in sources), part=part)


def recipe_of_options(options: PrepareOptions) -> Recipe:
    """The recipe that is named, or one of which preparing reads the rest."""
    data = options.data
    if isinstance(data, Mapping):
        data = resolve_recipe(data)
    if not isinstance(data, Recipe | Path | str):
        if not data:
            raise OptionError("is empty", "data", hint="name a folder of captioned pictures")
        data = data[0] if len(data) == 1 else data
    if isinstance(data, Recipe) or (isinstance(data, Path | str) and Path(data).suffix in (".yaml", ".yml")):
        for name in _OF_A_RECIPE:
            if getattr(options, name) is not None:
                raise OptionError("the recipe says this", name, hint="write it there")
        cache = [f"cache={_quoted(str(options.out))}"] if options.out else []
        if not isinstance(data, Recipe):
            return load_recipe(Path(data), cache)
        return data.model_copy(update={"cache": str(options.out)}) if options.out else data
    if options.out is None:
        raise OptionError("no cache folder is named", "out", hint="say `out` FOLDER")
    values: dict[str, object] = {"model": "emoji-base", "resolution": [128], "steps": 1}
    values |= {"cache": str(options.out), "out": str(options.out)}
    said = {name: getattr(options, name) for name in _OF_A_RECIPE if getattr(options, name) is not None}
    values |= {name: value for name, value in said.items() if name not in _OF_A_SOURCE}
    for index, folder in enumerate([data] if isinstance(data, Path | str) else data):
        values |= {f"data.{index}.path": str(folder)}
        values |= {f"data.{index}.{name}": said[name] for name in _OF_A_SOURCE if name in said}
    return load_recipe(None, [f"{key}={_quoted(value)}" for key, value in values.items()])


def parse_part(text: str | None) -> tuple[int, int]:
    """(i, n) from 0 of a part written i/n from 1; of None the process's own under torchrun, else the whole.

    Raises:
        OptionError: no such part.
        RunError: torchrun's environment has no such numbers.
    """
    if text is None:
        return own_rank()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise OptionError(f"{text!r} is no part", "shard", hint="write 1/4 to 4/4 for four parts")
    return int(match[1]) - 1, int(match[2])


def _quoted(value: object) -> str:
    """A value as YAML that is read back to the same text or number."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


prepare = by_keywords(PrepareOptions, prepare_with)

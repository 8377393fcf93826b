"""Adapters as users name them: a file, a run folder or another program's folder, and a weight."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from libreflux.adapter.checks import notice_training_adapter, refuse_training_adapter
from libreflux.errors import AdapterError
from libreflux.printing import WITH_OPTIONS, get_logger
from libreflux.values import adapter_argument
from libreflux.workflows.argument_types import check_path

logger = get_logger(__name__)

DEMO_MODEL = "emoji-libre"
FOR_PHOTOGRAPHS = ("jimmycarter/LibreFLUX", 34)
"""Hub id, and its download in GB: transformer 23.8, T5 9.5, CLIP 0.25, VAE 0.17."""

if TYPE_CHECKING:
    from libreflux.adapter.io import AdapterFile
    from libreflux.model.facts import Facts
    from libreflux.model.source import ModelSource


def as_typed(path: str, system: ModuleType = os.path) -> str:
    """The path of an adapter argument as a picture keeps it: a home that the shell wrote out is `~` again.

    Args:
        path: as the command got it.
        system: the rules of paths, `posixpath` or `ntpath`; below a home both give `~/` and slashes.
    """
    separators = {system.sep, system.altsep or system.sep}
    home = system.expanduser("~").rstrip("".join(separators))
    start, rest = path[: len(home)], path[len(home) :]
    inside = system.isabs(home) and rest[:1] in separators and system.normcase(start) == system.normcase(home)
    return f"~/{rest[1:].replace(system.sep, '/')}" if inside else path


def result_name(model: str, adapters: Iterable[Path]) -> str:
    """What the folder of a result is called: the model's name, and those of the folders of adapters or their files."""
    folders = (path.resolve() if path.is_dir() else path.resolve().parent for path in adapters)
    names = [Path(os.path.abspath(model)).name, *(folder.name for folder in folders)]
    return re.sub(r"[^\w.+-]+", "-", "+".join(names)).strip(".-") or "model"


def adapter_file(path: Path) -> Path:
    """A file as it is; the one in a folder of PEFT's or diffusers'; of a run folder its result or newest checkpoint.

    The checkpoint is taken while the run has more to do; it must be whole.

    Raises:
        AdapterError: a folder with neither.
    """
    if not path.is_dir():
        return path

    from libreflux.adapter.peft import file_in

    if (foreign := file_in(path)) is not None:
        return foreign

    from libreflux.training import checkpoint

    result, saved = path / checkpoint.ADAPTER, checkpoint.listed(path)
    if result.is_file() and (not saved or saved[-1].step <= _trained_steps(result)):
        return result
    newest = checkpoint.latest(path)
    if newest is None and not result.is_file():
        what = (
            "all its checkpoints are damaged" if saved else f"no {checkpoint.ADAPTER} and no checkpoint in this folder"
        )
        raise AdapterError(what, where=path, hint="name a run folder of `libreflux train`, or an adapter file")
    if newest is None or (result.is_file() and newest.step <= _trained_steps(result)):
        return result
    logger.warning("%s is not finished: its adapter after step %d is taken (%s)", path, newest.step, newest.adapter)
    return newest.adapter


def _trained_steps(path: Path) -> int:
    """The steps that a run's result says it had; 0 when it does not say."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return int((file.metadata() or {}).get("step", 0))
    except (safetensors.SafetensorError, ValueError):
        return 0  # whoever reads the tensors says what is wrong


def load_arguments(
    texts: str | Path | Iterable[str | Path], *, training_adapters: bool = False
) -> list[tuple[AdapterFile, float]]:
    """The files that adapter arguments name, read, each with its weight; see `adapter_argument` and `adapter_file`.

    Args:
        texts: the arguments.
        training_adapters: whether adapters that are made to be on while another is trained are of use here too: they
            are for what measures, not for what draws or makes a model.

    Raises:
        AdapterError: one that cannot be read, or a training adapter that is of no use here.
    """
    named = [adapter_argument(str(text)) for text in ([texts] if isinstance(texts, str | Path) else texts or ())]
    chosen = [(adapter_file(Path(os.path.expanduser(path))), weight) for path, weight in named]

    from libreflux.adapter import io

    loaded = [(io.load_adapter(path), weight) for path, weight in chosen]
    for file, _ in () if training_adapters else loaded:
        refuse_training_adapter(file)
    notice_training_adapter(file for file, _ in loaded)
    return loaded


def load_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter, of any kind that libreflux knows.

    A pipeline takes it with `load_lora_weights`, which brings its steps, guidance and text padding along.

    Args:
        path: an adapter file; a run folder, which gives its result, or its newest checkpoint while the run has more to
            do; or a folder of PEFT's or diffusers'.

    Raises:
        OptionError: no path.
        AdapterError: there is no adapter, or it cannot be read.
        NotFiniteError: NaN or infinite numbers in it.

    Example::

        import libreflux

        pipe = libreflux.LibreFluxPipeline.from_pretrained("emoji-schnell")
        pipe.load_lora_weights(libreflux.load_adapter("runs/mine"), weight=0.8)
        pipe("a red apple on blue").images[0].save("apple.png")
    """
    where = check_path(path, "path")

    from libreflux.adapter import io

    return io.load_adapter(adapter_file(where))


def default_model(texts: Iterable[str]) -> str:
    """What is drawn with when nobody names a model: what the first adapter was trained on, else emoji-libre.

    Raises:
        ModelError: the adapter names a model that is not here: nothing is fetched because a file says so.
    """
    for file, _ in load_arguments(list(texts)[:1], training_adapters=True):
        if told := file.metadata.get("model"):
            from libreflux.model.locate import told_model

            return told_model(told, file.where)
    logger.warning("%s is a demo model: emoji only, 128 px", DEMO_MODEL)
    logger.warning("for photographs: `model` %s (%d GB)", *FOR_PHOTOGRAPHS, extra=WITH_OPTIONS)
    return DEMO_MODEL


def adapted_facts(facts: Facts, files: Sequence[tuple[AdapterFile, float]]) -> Facts:
    """See `adapter.facts`."""
    from libreflux.adapter import facts as adapted

    return adapted.adapted_facts(facts, files)


def check_base(source: ModelSource, sha256: str, files: Sequence[tuple[AdapterFile, float]]) -> None:
    """See `adapter.checks`."""
    from libreflux.adapter import checks

    checks.check_base(source, sha256, [file for file, _ in files])

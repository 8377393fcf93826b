"""Whether an adapter may be on a model: what it is for, and what it was trained on. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from libreflux.errors import AdapterError
from libreflux.printing import get_logger

if TYPE_CHECKING:
    from libreflux.adapter.io import AdapterFile
    from libreflux.model.source import ModelSource

logger = get_logger(__name__)


def refuse_training_adapter(file: AdapterFile) -> None:
    """Raises AdapterError for one that is on a model only while another adapter is trained."""
    if not file.is_training_adapter:
        return
    hint = (
        "name it as adapter.training_adapter in a recipe; to look at it, use libreflux probe or inspect; "
        "libreflux diff of the model and this file makes an ordinary adapter of it"
    )
    raise AdapterError(
        "is a training adapter, which is on only while another one is trained", where=file.where, hint=hint
    )


_told: set[str] = set()


def notice_training_adapter(files: Iterable[AdapterFile]) -> None:
    """Says once which training adapter an adapter was trained with: it is used without it."""
    for file in files:
        if file.metadata.get("training_adapter") and file.sha256 not in _told:
            _told.add(file.sha256)
            logger.warning(
                "%s was trained with the training adapter %s (%s), and is used without it",
                file.where,
                file.metadata["training_adapter"],
                file.metadata.get("training_adapter_sha256", "?")[:10],
            )


def check_base(
    source: ModelSource, sha256: str, files: Sequence[AdapterFile], beside: Sequence[AdapterFile] = ()
) -> None:
    """Looks whether adapters belong on a model. Another model than they were trained on is allowed, and is told.

    Args:
        source: the model.
        sha256: of its weights.
        files: the adapters that are put on it now.
        beside: those that are on it already.

    Raises:
        AdapterError: one was trained on this model with an adapter merged in, which is not here.
    """
    from libreflux.adapter.lineage import lacking, merged_in

    inside = merged_in(source.facts.lineage)
    for file in files:
        trained_on, model = file.metadata.get("model_hash", sha256), file.metadata.get("model", "an unnamed model")
        missing = lacking(sha256, source.facts.lineage, file, [*beside, *files])
        if missing:
            names = ", ".join(missing.values())
            told = f"was trained on {model}, which is this model with {names} merged in"
            raise AdapterError(told, where=file.where, hint=f"use it on {model}, or together with {names}")
        if file.sha256 in inside:
            logger.warning("%s is merged into %s already: it is added once more", file.where, source.name)
        elif missing is None:
            logger.warning(
                "%s was trained on other weights (%s of %s) than these (%s)",
                file.where,
                trained_on[:10],
                model,
                sha256[:10],
            )

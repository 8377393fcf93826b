"""The configurations of FLUX.1's parts, from this package: what a plan needs of a model that is not here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from libreflux import plainjson
from libreflux.errors import ModelError
from libreflux.model.facts import known_facts, needs_login, write_facts
from libreflux.model.locate import LOGIN, hub_reason, locate
from libreflux.model.single_file import CONFIGS

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@contextmanager
def planned_model(name: str) -> Iterator[tuple[str, str | None]]:
    """A model for plans: its configurations and facts are read, and no weight.

    Args:
        name: see `locate`.

    Yields:
        The name itself and None; or, for a known hub id whose files are neither here nor to be had, a folder of its
        configurations as this package knows them, which lasts as long as the block, and a line that says so.

    Raises:
        ModelError: there is no such model, or it is not known and cannot be had.
    """
    try:
        locate(name, weights=False)
    except ModelError as error:
        if error.__cause__ is None or known_facts(name) is None or _no_such_revision(error.__cause__):
            raise
        reason, gated = hub_reason(error.__cause__), _is_gated(error.__cause__)
    else:
        yield name, None
        return
    with tempfile.TemporaryDirectory(prefix="libreflux-") as folder:
        login = f"; to train it: {LOGIN}" if needs_login(name) or gated else ""
        yield str(write_configs(name, Path(folder))), f"{name}: {reason}; planned with its known sizes{login}"


def write_configs(name: str, folder: Path) -> Path:
    """The configurations and facts of a known hub id as a model's folder without weights; returns `folder`.

    Raises:
        ModelError: not a known hub id.
    """
    facts = known_facts(name)
    if facts is None:
        raise ModelError("not a known model", where=name, hint="name a hub id of `libreflux models`")
    for part in PARTS:
        config = plainjson.parse((CONFIGS / f"{part}.json").read_text(encoding="utf-8"))
        if part == "transformer":
            config["guidance_embeds"] = facts.guidance_embeds
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    write_facts(folder, facts)
    return folder


def _is_gated(cause: BaseException) -> bool:
    from huggingface_hub.errors import GatedRepoError

    return isinstance(cause, GatedRepoError)


def _no_such_revision(cause: BaseException) -> bool:
    from huggingface_hub.errors import RevisionNotFoundError

    return isinstance(cause, RevisionNotFoundError)

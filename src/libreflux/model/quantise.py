"""A model in int8, from one in floating point: tensor by tensor, so that it need not fit into memory."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from libreflux.errors import ModelError
from libreflux.files import staged_dir
from libreflux.model.facts import Facts, write_facts
from libreflux.model.int8_files import METHOD, empty_int8, stored_as, stream_int8, write_all_checksums, write_int8
from libreflux.model.load import one_line
from libreflux.model.locate import PARTS, locate, part_folder
from libreflux.model.opening import open_model
from libreflux.model.parts import check_part, copy_part, json_object
from libreflux.model.save import LiveParts, save_model
from libreflux.model.single_file import SingleFiles


def quantise_folder(name: str | Path | SingleFiles, out: Path) -> Path:
    """Write a model in int8, as a folder that `open_model` loads; one dense tensor and one shard are held at a time.

    Args:
        name: of a model in floating point, see `locate`; of single files the int8 model is in memory as a whole.
        out: appears complete or not at all.

    Raises:
        ModelError: no such model, a damaged one, or one that is quantised already.
        RunError: `out` exists.
    """
    model = open_model(name)
    if isinstance(name, SingleFiles):
        live = LiveParts(
            transformer=model.load_transformer(quantise=True), vae=model.load_vae(), text=model.load_text()
        )
        return save_model(out, _quantised(model.facts, str(name), model.hash), live)
    folder = locate(name)  # with its weights
    source = folder / "transformer"
    if stored_as(model.config, source) == METHOD:
        raise ModelError("is stored in int8", where=source, hint="use it as it is")
    check_part(source)
    with one_line(source):
        empty = empty_int8(source)
    with staged_dir(Path(out)) as staging:
        write_int8(staging / "transformer", json_object(source / "config.json"), stream_int8(source, empty))
        for part in PARTS:
            if part != "transformer" and (stored := part_folder(folder, part)).is_dir():
                copy_part(stored, staging / part)
        shutil.copyfile(folder / "model_index.json", staging / "model_index.json")
        write_facts(staging, _quantised(model.facts, str(name), model.hash))
        write_all_checksums(staging)
    return Path(out)


def _quantised(facts: Facts, name: str, sha256: str) -> Facts:
    lineage = {**facts.lineage, "quantised": {"how": METHOD, "from": name, "sha256": sha256}}
    return dataclasses.replace(facts, lineage=lineage, parts_from=None)

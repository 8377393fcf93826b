"""A model that is to be probed, before its weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux.adapter.io import AdapterFile
from libreflux.data.digests import FileMemory
from libreflux.files import sha256_file
from libreflux.model.facts import Facts
from libreflux.model.locate import EMOJI, PARTS, locate, part_folder
from libreflux.model.opening import open_model
from libreflux.model.parts import visible
from libreflux.model.source import ModelSource
from libreflux.model.text import check_trained_padding
from libreflux.workflows.adapters import adapted_facts, check_base, load_arguments, result_name

CACHE = "cache"
"""Its folder in a result's."""
PROBES = Path("out/probe")
LARGE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class ProbedModel:
    """A model under its adapters.

    Attributes:
        source: the model, with its facts as they are under its adapters.
        sha256: of its transformer's weights.
        files: the adapters with their weights.
        family: whether it draws in the emoji family's latents.
        memory: of checksums that were computed before.
    """

    source: ModelSource
    sha256: str
    files: list[tuple[AdapterFile, float]]
    family: bool
    memory: FileMemory

    @staticmethod
    def read(name: str, adapters: str | Path | Sequence[str | Path], out: Path | None) -> ProbedModel:
        """What can be known of a model without its weights, but for their checksum.

        Args:
            name: a name, a folder or a hub id.
            adapters: as users name them.
            out: the result's folder; None is the model's own.

        Raises:
            ModelError: no such model, or a text padding that it was not trained with.
            AdapterError: an adapter that cannot be read, or two that do not go together.
        """
        files, source = load_arguments(adapters, training_adapters=True), open_model(name)
        source = source.with_facts(adapted_facts(source.facts, files))
        check_trained_padding(source.facts.text_padding)
        source.fetch(*PARTS)
        memory = FileMemory((out or PROBES / result_name(name, [Path(file.where) for file, _ in files])) / CACHE)
        sha256 = source.hash_with(memory.sha256)
        check_base(source, sha256, files)
        return ProbedModel(source, sha256, files, is_family(source), memory)

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.source.name

    @property
    def facts(self) -> Facts:
        """The model's, under its adapters."""
        return self.source.facts

    def kept_in(self, out: Path) -> ProbedModel:
        """The same model, its result and checksums kept in another folder."""
        return dataclasses.replace(self, memory=FileMemory(out / CACHE))

    @property
    def own_out(self) -> Path:
        """Where its result is put when nobody names a folder."""
        return PROBES / result_name(self.name, [Path(file.where) for file, _ in self.files])

    @property
    def large(self) -> bool:
        """Whether it has billions of parameters."""
        files = visible(self.source.path / "transformer", "*.safetensors")
        return sum(file.stat().st_size for file in files) > LARGE_BYTES

    @property
    def trained_subjects(self) -> tuple[str, ...] | None:
        """Subjects that it says it was trained on."""
        told = self.facts.lineage.get("trained_subjects")
        return tuple(map(str, told)) if isinstance(told, list) and told else None

    def as_json(self) -> dict[str, Any]:
        """As probe.json keeps it."""
        rows = [{"name": Path(f.where).name, "sha256": f.sha256, "weight": weight} for f, weight in self.files]
        return {
            "name": self.name,
            "sha256": self.sha256,
            "adapters": rows,
            "steps": self.facts.steps,
            "guidance": self.facts.guidance,
            "text_padding": self.facts.text_padding,
            "distilled_from": self.facts.lineage.get("distilled_from"),
        }


def is_family(source: ModelSource) -> bool:
    """Whether a model draws in the emoji family's latents: it has the very VAE."""
    if source.name in EMOJI:
        return True
    here, ours = (visible(part_folder(each, "vae"), "*.safetensors") for each in (source.path, locate(EMOJI[0])))
    sizes = [[file.stat().st_size for file in files] for files in (here, ours)]
    return sizes[0] == sizes[1] and [sha256_file(f) for f in here] == [sha256_file(f) for f in ours]

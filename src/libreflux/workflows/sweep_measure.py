"""One candidate of a sweep after another: made, put on the model, measured and drawn with, kept, and taken off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from libreflux import plainjson
from libreflux.adapter.io import AdapterFile, attach_file
from libreflux.adapter.reading import prepared
from libreflux.errors import ModelError
from libreflux.files import atomic_write_json
from libreflux.model import latents as latent_space
from libreflux.model.device import release
from libreflux.model.device_faults import explained
from libreflux.model.numerics import pinned
from libreflux.model.w8a8 import kind_for, quantise_activations
from libreflux.probing import drawing
from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.metrics.measures import Moments, moments
from libreflux.result_key import digest
from libreflux.sample.metadata import save_png
from libreflux.sample.model_key import config_digest, facts_key
from libreflux.training.hindsight import Averaged, Kept
from libreflux.training.planned import BASE_DTYPES, INT8_BASES
from libreflux.workflows.probe_data import ProbeData
from libreflux.workflows.probe_model import ProbedModel
from libreflux.workflows.progress import Progress
from libreflux.workflows.sweep_candidates import Candidate

FORMULA = 1
"""Raised when the same candidate on the same pictures comes to have other numbers, not only other last bits."""


@dataclass(frozen=True, eq=False)
class Judged:
    """What was found of one candidate.

    Attributes:
        candidate: which.
        moments: on the pictures, each under its caption.
        gap: how far averaging factors, not products, moved the adapter, relative to its norm.
        pictures: file of each drawn picture, by guidance scale, then prompt, then seed, below the result's folder.
    """

    candidate: Candidate
    moments: Moments
    gap: float
    pictures: Sequence[Sequence[str]]


class Sweep:
    """The candidates of a run, judged on the same pictures under the same noise, and drawn from the same noise.

    At most three adapters are in memory at a time: what a candidate was averaged into, the same once it is put on the
    model (in the model's precision), and while it is averaged some rows of its sources.

    Args:
        kept: of the run.
        model: under one of the run's adapters.
        data: the pictures and prompts.
        seeds: each prompt is drawn from each.
        out: the result's folder.
        device: what computes.

    Attributes:
        made: how many candidates were made now; the others were kept whole.
    """

    def __init__(
        self, kept: Kept, model: ProbedModel, data: ProbeData, seeds: Sequence[int], out: Path, device: torch.device
    ) -> None:
        self.kept, self.model, self.data, self.out, self.device = kept, model, data, out, device
        self.made = 0
        texts = [one.text for one in data.prompts]
        each = tuple((text, seed) for text in texts for seed in seeds)
        prompts, starts = tuple(text for text, _ in each), tuple(seed for _, seed in each)
        steps = data.settings.draw_steps
        self.batches = [PictureBatch(prompts, starts, scale, steps) for scale in data.settings.guidance]
        self._parts: tuple[FluxTransformer2DModel, AutoencoderKL] | None = None

    def judged(self, candidates: Sequence[Candidate], progress: Progress) -> list[Judged]:
        """All of them; what is kept is not computed again.

        Raises:
            ModelError: a candidate whose velocity is not finite.
        """
        passes = len(self.data.held_out) * len(self.data.settings.sigmas), sum(one.passes for one in self.batches)
        todo = [(self._read(one) is None, not self._is_drawn(one)) for one in candidates]
        total = sum(measure * passes[0] + draw * passes[1] for measure, draw in todo)
        done = 0
        with progress("sweeping", "sample") as report:
            for candidate, (measure, draw) in zip(candidates, todo, strict=True):
                if not (measure or draw):
                    continue

                def advance(samples: int, name: str = candidate.name) -> None:
                    nonlocal done
                    done += samples
                    report(done, total, name)

                with self._put_on(candidate) as (averaged, context):
                    context.advance = advance
                    if measure:
                        self._measure(candidate, averaged, context)
                    if draw:
                        self._draw(candidate, context)
                self.made += 1
        return [self._whole(candidate) for candidate in candidates]

    @contextmanager
    def _put_on(self, candidate: Candidate) -> Iterator[tuple[float, ProbeContext]]:
        """The gap of a candidate, and the model with it."""
        transformer, vae = self._open()
        with explained(f"putting {candidate.name} on the model", "int8 weights, or the CPU"):
            file, gap = _as_file(candidate.make(self.kept), candidate)
            adapter = attach_file(transformer, file, dtype=transformer.dtype)
        del file
        try:
            yield gap, self._context(candidate, transformer, vae)
        finally:
            adapter.detach()

    def _open(self) -> tuple[FluxTransformer2DModel, AutoencoderKL]:
        """The base as the run had it, once for all candidates."""
        if self._parts is None:
            with explained(f"reading the model onto {self.device}", "int8 weights, or the CPU"):
                release(self.device)  # the text encoders, before the transformer comes
                base, source = self.data.settings.dtype, self.model.source
                dtype, quantise = BASE_DTYPES[base], base in INT8_BASES
                transformer = source.load_transformer(dtype=dtype, quantise=quantise or None, device=self.device)
                if base == "w8a8":
                    quantise_activations(transformer, kind_for(self.device))
                vae = source.load_vae(dtype=torch.float32, device=self.device)
            self._parts = transformer.requires_grad_(False).eval(), vae
        return self._parts

    def _context(self, candidate: Candidate, transformer: FluxTransformer2DModel, vae: AutoencoderKL) -> ProbeContext:
        identity = digest([self._decided(), candidate.key])
        return ProbeContext(
            transformer=transformer,
            vae=vae,
            facts=self.model.facts,
            settings=self.data.settings,
            held_out=self.data.held_out,
            prompts=self.data.prompts,
            texts=self.data.cache.text,
            out=self.out,
            identity=identity,
            older_identity=identity,
        )

    def _measure(self, candidate: Candidate, gap: float, context: ProbeContext) -> None:
        settings, found, ids = self.data.settings, list[Moments](), list[str]()
        with torch.no_grad(), pinned(self.device):
            for part in self.data.held_out.batches(settings.batch):
                velocity, latents = context.velocity(part.text), part.latents.to(self.device)
                found.append(moments(velocity, latents, part.sample_ids, settings.sigmas, seed=settings.seed))
                ids += part.sample_ids
        every = Moments.cat(found)
        columns = {name: getattr(every, name) for name in ("error", "cross", "power")}
        if not all(np.isfinite(column).all() for column in columns.values()):
            raise ModelError("its velocity is not finite", where=candidate.name, hint="leave it out")
        rows = {name: column.tolist() for name, column in columns.items()}
        key = self._key(candidate)
        atomic_write_json(
            self._file(candidate), {"schema": 1, "key": key, "name": candidate.name, "gap": gap, "ids": ids, **rows}
        )

    def _draw(self, candidate: Candidate, context: ProbeContext) -> None:
        for batch, files in zip(self.batches, self._picture_files(candidate), strict=True):
            if all(map(_is_whole, files)):
                context.advance(batch.passes)
                continue
            for latents, file in zip(context.draw_batch(batch).latents, files, strict=True):
                pixels = latent_space.decode(context.vae, latents[None].to(self.device))[0].float()
                array: Any = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                save_png(Image.fromarray(array), file, None)

    def _whole(self, candidate: Candidate) -> Judged:
        found = self._read(candidate)
        assert found is not None
        files = self._picture_files(candidate)
        pictures = [[file.relative_to(self.out).as_posix() for file in row] for row in files]
        return Judged(candidate, *found, pictures)

    def _read(self, candidate: Candidate) -> tuple[Moments, float] | None:
        """What was measured before; None if it is not there, damaged, or of another key."""
        try:
            rows = plainjson.parse(self._file(candidate).read_text(encoding="utf-8"))
            if (rows["schema"], rows["key"]) != (1, self._key(candidate)):
                return None
            columns = (np.array(rows[name], np.float64) for name in ("error", "cross", "power"))
            return Moments(tuple(self.data.settings.sigmas), *columns), float(rows["gap"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _is_drawn(self, candidate: Candidate) -> bool:
        return all(_is_whole(file) for row in self._picture_files(candidate) for file in row)

    def _file(self, candidate: Candidate) -> Path:
        return self.out / "candidates" / f"{self._key(candidate)[:24]}.json"

    def _picture_files(self, candidate: Candidate) -> list[list[Path]]:
        made = [self._decided(), candidate.key, drawing.FORMULA]
        return [
            [
                self.out / "pictures" / f"{digest([*made, text, seed, batch.guidance, batch.steps])[:24]}.png"
                for text, seed in zip(batch.prompts, batch.seeds, strict=True)
            ]
            for batch in self.batches
        ]

    def _key(self, candidate: Candidate) -> str:
        """Of all that decides what is measured."""
        settings = self.data.settings
        pictures = [list(self.data.held_out.sample_ids), settings.data[1]]
        return digest([self._decided(), candidate.key, pictures, list(settings.sigmas), settings.seed])

    def _decided(self) -> dict[str, Any]:
        """Of the model and how it computes what decides a velocity; the cache knows VAE, text encoders and tokens."""
        config = self.model.source.config_file
        settings = self.data.settings
        return {
            "formula": FORMULA,
            "transformer": self.model.sha256,
            "transformer_config": "" if config is None else config_digest(config),
            "facts": facts_key(self.model.facts),
            "cache": self.data.cache.settings,
            "base": settings.dtype if settings.dtype != "w8a8" else f"w8a8 {kind_for(self.device)}",
            "resolution": settings.resolution,
            "batch": settings.batch,
        }


def _as_file(made: Averaged, candidate: Candidate) -> tuple[AdapterFile, float]:
    """Of tensors that are checked to be finite."""
    return AdapterFile(candidate.name, prepared(made.tensors, candidate.name), made.metadata), made.gap


def _is_whole(path: Path) -> bool:
    """Whether a picture is there; it was written by one rename."""
    return path.is_file() and path.stat().st_size > 0

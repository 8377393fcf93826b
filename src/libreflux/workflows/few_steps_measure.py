"""Models that draw one after another for a health check of few steps; what is seen in each set of pictures is kept."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from libreflux.adapter.io import attach_file
from libreflux.files import atomic_write_bytes
from libreflux.model.device import release
from libreflux.model.device_faults import explained
from libreflux.model.numerics import pinned
from libreflux.probing import drawing, seen
from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.few_steps import Ends, Pictures, Point, point
from libreflux.probing.results import Measure
from libreflux.probing.run import SMALLER
from libreflux.probing.section import SEED_STRIDE
from libreflux.probing.seen import Seen, see
from libreflux.probing.subjects import parse_prompt
from libreflux.result_key import digest
from libreflux.sample.model_key import config_digest, facts_key
from libreflux.workflows.few_steps_data import JudgeFile, Place, place_of
from libreflux.workflows.few_steps_models import Subject, Subjects
from libreflux.workflows.probe_data import ProbeData
from libreflux.workflows.probe_measure import DTYPES
from libreflux.workflows.progress import Progress

SHOWN = 6
"""Pictures of a set that are kept to be looked at."""
_AGAIN, _NEW = SEED_STRIDE // 4, SEED_STRIDE // 2
"""Where the seeds of the second drawing, and of the new pictures' captions, begin."""


@dataclass(frozen=True)
class Sheet:
    """Pictures to look at: file of each, below the result's folder, by model, then prompt.

    Attributes:
        texts: the prompts.
        rows: (name of the model, files).
    """

    texts: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


class Checkup:
    """The models of a health check, which draw the same prompts from the same seeds.

    Args:
        subjects: the models.
        data: pictures and prompts by how a model reads texts.
        judge: who sees what is drawn.
        out: the result's folder.
        device: what computes.

    Attributes:
        made: how many sets of pictures were drawn now; the others were there.
    """

    def __init__(
        self, subjects: Subjects, data: Mapping[Place, ProbeData], judge: JudgeFile, out: Path, device: torch.device
    ) -> None:
        self.subjects, self.data, self.judge, self.out, self.device = subjects, data, judge, out, device
        self.first = data[place_of(subjects.distilled)]
        self.made = 0
        texts = tuple(one.text for one in self.first.prompts)
        settings, steps = self.first.settings, subjects.steps
        start = settings.seed * SEED_STRIDE
        own = settings.own_guidance

        def batch(texts: tuple[str, ...], offset: int, guidance: float) -> PictureBatch:
            return PictureBatch(texts, tuple(start + offset + row for row in range(len(texts))), guidance, steps)

        self.others, self.again = batch(texts, 0, own), batch(texts, _AGAIN, own)
        self.guided = tuple(batch(texts, 0, scale) for scale in settings.guidance)
        self.new = batch(tuple(self.first.captions), _NEW, own)
        self._parts: tuple[str, FluxTransformer2DModel, AutoencoderKL] | None = None

    def points(self, progress: Progress) -> list[Point]:
        """What was found of each adapted model; what is kept is not drawn again."""
        plan = [(one, [batch for batch in self._batches(one) if not self._is_kept(one, batch)]) for one in self._all()]
        total = sum(batch.passes for _, todo in plan for batch in todo)
        done = 0
        with progress("probing", "sample") as report:
            for subject, todo in plan:
                if not todo:
                    continue

                def advance(samples: int, name: str = subject.name) -> None:
                    nonlocal done
                    done += samples
                    report(done, max(total, done), name)

                with self._opened(subject) as context:
                    context.advance = advance
                    for batch in todo:
                        self._draw(subject, batch, context)
                        self.made += 1
        return [point(one.name, one.step, self._pictures(one), self.ends) for one in self.subjects.adapted]

    def end_measures(self) -> list[Measure]:
        """What the ends of both ways measure, once `points` were made."""
        ends = self.ends
        rows = [row for table in (ends.of_others, ends.to_new) for part in table.values() for row in part.values()]
        return rows if ends.ceiling is None else [*rows, ends.ceiling]

    def sheets(self, points: Sequence[Subject]) -> tuple[Sheet, Sheet]:
        """Pictures of the new captions, and of the other prompts, by the ends and by these of the adapted models."""
        told = [(self.subjects.distilled, "distilled"), *((one, one.name) for one in points)]
        new = [("new pictures", self._shown_new()), *((name, self._shown(one, self.new)) for one, name in told)]
        told.append((self.subjects.broken, self.subjects.broken.name))
        others = [(name, self._shown(one, self.others)) for one, name in told]
        return Sheet(self.new.prompts[:SHOWN], new), Sheet(self.others.prompts[:SHOWN], others)

    def _all(self) -> tuple[Subject, ...]:
        return (self.subjects.distilled, self.subjects.broken, *self.subjects.adapted)

    def _batches(self, subject: Subject) -> list[PictureBatch]:
        if subject is self.subjects.broken:
            return [self.others]
        found = [self.new, self.others, *self.guided]
        found += [self.again] if subject is self.subjects.distilled else []
        return list({digest(one.as_json()): one for one in found}.values())

    @functools.cached_property
    def ends(self) -> Ends:
        """What the adapted models are compared with, once `points` were made."""
        subjects, judge = self.subjects, self.judge.judge
        return Ends(
            new=self._new(),
            distilled=self._pictures(subjects.distilled),
            again=self._seen(subjects.distilled, self.again),
            broken=self._seen(subjects.broken, self.others),
            prompts=self.first.prompts,
            judge=judge,
            seed=self.first.settings.seed,
            captions=[parse_prompt(text, judge.questions) for text in self.first.captions],
        )

    def _pictures(self, subject: Subject) -> Pictures:
        first, second = (self._seen(subject, batch) for batch in self.guided)
        return Pictures(self._seen(subject, self.new), self._seen(subject, self.others), (first, second))

    def _new(self) -> Seen:
        """The new pictures, once they have been through the VAE."""
        path = self.out / "seen" / f"{self._new_key()[:24]}.safetensors"
        found = Seen.load(path)
        if found is None or not all((self.out / file).is_file() for file in self._shown_new()):
            with self._opened(self.subjects.distilled) as context:
                latents = torch.cat([part.latents for part in self.first.held_out.batches(context.settings.batch)])
                found = see(latents, context.vae, self.judge.judge)
                self._keep(context, latents, self._shown_new())
            found.save(path)
        return found

    def _draw(self, subject: Subject, batch: PictureBatch, context: ProbeContext) -> None:
        with pinned(self.device), explained(f"drawing with {subject.name}", SMALLER):
            latents = context.drawn(batch).latents
            found = see(latents, context.vae, self.judge.judge)
        self._keep(context, latents, self._shown(subject, batch))
        found.save(self._file(subject, batch))

    def _keep(self, context: ProbeContext, latents: torch.Tensor, names: Sequence[str]) -> None:
        for name, one in zip(names, latents, strict=False):
            held = io.BytesIO()
            Image.fromarray(context.picture(one)).save(held, format="PNG")
            atomic_write_bytes(self.out / name, held.getvalue())

    def _seen(self, subject: Subject, batch: PictureBatch) -> Seen:
        found = Seen.load(self._file(subject, batch))
        assert found is not None
        return found

    def _is_kept(self, subject: Subject, batch: PictureBatch) -> bool:
        shown = all((self.out / name).is_file() for name in self._shown(subject, batch))
        return shown and Seen.load(self._file(subject, batch)) is not None

    def _file(self, subject: Subject, batch: PictureBatch) -> Path:
        return self.out / "seen" / f"{self._key(subject, batch)[:24]}.safetensors"

    def _shown(self, subject: Subject, batch: PictureBatch) -> list[str]:
        key = self._key(subject, batch)[:16]
        return [f"pictures/{key}-{row}.png" for row in range(min(SHOWN, len(batch)))]

    def _shown_new(self) -> list[str]:
        return [f"pictures/{self._new_key()[:16]}-{row}.png" for row in range(min(SHOWN, len(self.new)))]

    def _key(self, subject: Subject, batch: PictureBatch) -> str:
        return digest([seen.FORMULA, self.judge.sha256, self._identity(subject), batch.as_json()])

    def _new_key(self) -> str:
        how = [self.first.settings.resolution, self.first.cache.settings, self.first.settings.data[1]]
        return digest([seen.FORMULA, self.judge.sha256, "new", how])

    def _identity(self, subject: Subject) -> str:
        """Of all that decides a drawing besides `PictureBatch`; the cache knows VAE, text encoders and tokens."""
        model, settings = subject.model, self.first.settings
        config = model.source.config_file
        decided: dict[str, Any] = {
            "transformer": model.sha256,
            "transformer_config": "" if config is None else config_digest(config),
            "adapters": list(subject.key),
            "facts": facts_key(model.facts),
            "cache": self.data[place_of(subject)].cache.settings,
            "drawing": drawing.FORMULA,
        }
        return digest([decided, settings.resolution, settings.dtype, settings.batch])

    @contextmanager
    def _opened(self, subject: Subject) -> Iterator[ProbeContext]:
        """A model with its adapters on; the weights stay for the next one, if that has the same."""
        model = subject.model
        if self._parts is None or self._parts[0] != model.sha256:
            self._parts = None
            with explained(f"reading {model.name} onto {self.device}", SMALLER):
                release(self.device)
                dtype = DTYPES[self.first.settings.dtype]
                transformer = model.source.load_transformer(dtype=dtype, device=self.device)
                vae = model.source.load_vae(dtype=torch.float32, device=self.device)
            self._parts = model.sha256, transformer.requires_grad_(False).eval(), vae
        _, transformer, vae = self._parts
        put = [attach_file(transformer, file, weight, dtype=transformer.dtype) for file, weight in subject.adapters()]
        data = self.data[place_of(subject)]
        identity = self._identity(subject)
        try:
            yield ProbeContext(
                transformer=transformer,
                vae=vae,
                facts=model.facts,
                settings=data.settings,
                held_out=data.held_out,
                prompts=data.prompts,
                texts=data.cache.text,
                out=self.out,
                identity=identity,
                older_identity=identity,
                judge=self.judge.judge,
            )
        finally:
            for adapter in reversed(put):
                adapter.detach()

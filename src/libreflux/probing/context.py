"""What the measures need of a model: velocities, drawn pictures and what is seen in them, each computed once."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from libreflux.data.held_out import HeldOut
from libreflux.files import atomic_save_safetensors, atomic_write_bytes
from libreflux.flow.schedule import ladder
from libreflux.flow.solve import Step
from libreflux.model import latents as latent_space
from libreflux.model.facts import Facts
from libreflux.model.text import TextConditioning
from libreflux.probing.drawing import Drawn, PictureBatch, draw
from libreflux.probing.held_out import model_velocity
from libreflux.probing.judges import Judge
from libreflux.probing.metrics.image_stats import Look, look_at
from libreflux.probing.metrics.measures import Velocity
from libreflux.probing.reader import Reader
from libreflux.probing.results import Coordinate, Picture
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt, find_name, groups, parse_prompt
from libreflux.result_key import adopt, digest
from libreflux.sample.finite import check_latents
from libreflux.sample.guidance import GuidedVelocity
from libreflux.sample.noise import noise
from libreflux.values import is_guided

Texts = Callable[[Sequence[str]], TextConditioning]
PaddingTexts = Mapping[tuple[str, int], TextConditioning]
"""(padding or `OWN`, tokens of the prompts) → prompts, see `padding.encode`."""
OWN = "own"


@dataclass(eq=False)
class ProbeContext:
    """A model, opened, with held-out pictures and prompts.

    Attributes:
        transformer, vae: in memory, adapters attached.
        facts: the model's, under its adapters.
        settings: of the probe.
        held_out: pictures, as cached latents with cached captions.
        prompts: the prompts to draw.
        texts: cached conditioning of captions, prompts and negatives.
        padding_texts: prompts under other paddings.
        out: the result's folder.
        identity: digest of model, adapters and what decides a drawing besides `PictureBatch`.
        older_identity: what the first versions took for it.
        subjects: every known subject's name.
        judge: None without.
        reader: of text in pictures, None without.
        advance: told how many samples went through the model.
        weakened: every guidance is multiplied by it as pictures are drawn, none (0 and 1) is 1: a control, see
            `no_training`.
    """

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    facts: Facts
    settings: Settings
    held_out: HeldOut
    prompts: Sequence[ParsedPrompt]
    texts: Texts
    out: Path
    identity: str
    older_identity: str
    subjects: Collection[str] = ()
    padding_texts: PaddingTexts = field(default_factory=dict)
    judge: Judge | None = None
    reader: Reader | None = None
    advance: Callable[[int], None] = lambda samples: None
    weakened: float = 1.0
    _looks: dict[str, Look] = field(default_factory=dict)

    @property
    def embedded(self) -> float | None:
        """What the network's guidance embedding is fed, None for one without."""
        return self.facts.embedded_guidance

    def velocity(self, text: TextConditioning) -> Velocity:
        """The model's velocity under these prompts."""
        plain = model_velocity(self.transformer, text, guidance=self.embedded)

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            found = plain(x, sigma)
            self.advance(len(x))
            return found

        return counted

    def groups(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Subsets of units that have these captions or prompts."""
        return groups([find_name(text, self.subjects) for text in texts], self.settings.seen)

    def parse(self, text: str) -> ParsedPrompt:
        """What a text names of what the judge knows."""
        return ParsedPrompt(text) if self.judge is None else parse_prompt(text, self.judge.questions)

    def drawn(self, batch: PictureBatch) -> Drawn:
        """Pictures, from disk if this model has drawn them before."""
        path = self._drawn_file(batch, self.identity)
        adopt(path, self._drawn_file(batch, self.older_identity))
        try:
            return Drawn(**load_file(path))
        except (OSError, SafetensorError, TypeError):
            drawn = self.draw_batch(batch)
        atomic_save_safetensors({name: getattr(drawn, name) for name in ("latents", "length", "energy")}, path)
        return drawn

    def has_drawn(self, batch: PictureBatch) -> bool:
        """Whether they are on disk."""
        return any(self._drawn_file(batch, each).is_file() for each in (self.identity, self.older_identity))

    def _drawn_file(self, batch: PictureBatch, identity: str) -> Path:
        return self.out / "drawn" / f"{digest([identity, batch.as_json()])[:24]}.safetensors"

    def draw_batch(self, batch: PictureBatch) -> Drawn:
        """Draws them now, whatever is on disk."""
        lengths = self.texts(batch.prompts).lengths
        # Prompts of one length need no mask, which is faster; the order within a batch changes nothing.
        order = sorted(range(len(batch)), key=lambda i: (lengths[i], i))
        size = self.settings.batch
        parts = [self._draw_rows(batch, order[start : start + size]) for start in range(0, len(order), size)]
        return Drawn.cat(parts).index(np.argsort(order).tolist())

    @torch.no_grad()
    def _draw_rows(self, batch: PictureBatch, rows: Sequence[int]) -> Drawn:
        side = self.settings.resolution // latent_space.stride(self.vae)
        device = self.transformer.device
        text = self.texts([batch.prompts[row] for row in rows]).to(device)
        against = self.texts([batch.negatives[row] if batch.negatives else "" for row in rows]).to(device)
        scale = self.weakened * (batch.guidance if is_guided(batch.guidance) else 1.0)
        guided = GuidedVelocity(
            self.transformer,
            text if scale else against,
            against,
            latent_space.image_ids(side, side, device=device),
            scale=scale,
            batch_cfg=False,
            embedded_guidance=self.facts.embedded_guidance,
        )
        start = noise([batch.seeds[row] for row in rows], int(self.vae.config.latent_channels), side, side)
        sigmas = ladder(batch.steps, self.facts.shift_at((side // 2) ** 2))

        def counted(step: Step) -> None:
            self.advance(len(rows) * (2 if guided.is_guided(step.index) else 1))

        check = functools.partial(check_latents, guided=guided)
        return draw(guided, start.to(device), sigmas, on_step=counted, check=check)

    def look(self, batch: PictureBatch) -> Look:
        """What is seen in these pictures."""
        key = digest(batch.as_json())
        if key not in self._looks:
            self._looks[key] = look_at(self.drawn(batch).latents, self.vae, self.judge)
        return self._looks[key]

    def held_out_captions(self) -> list[str]:
        """Of the held-out pictures, in the order of `held_out.batches(batch)`."""
        return [caption for part in self.held_out.batches(self.settings.batch) for caption in part.captions]

    def held_out_look(self) -> Look:
        """What is seen in the held-out pictures once they have been through the VAE, in the order of the captions."""
        if "held-out" not in self._looks:
            parts = self.held_out.batches(self.settings.batch)
            self._looks["held-out"] = Look.cat([look_at(part.latents, self.vae, self.judge) for part in parts])
        return self._looks["held-out"]

    def keep(self, purpose: str, batch: PictureBatch, rows: Sequence[int], **at: Coordinate) -> list[Picture]:
        """Writes some of these pictures as PNG; none of a control, which no page shows."""
        drawn, kept = self.drawn(batch), list[Picture]()
        if self.weakened != 1:
            return kept
        for row in rows:
            place: dict[str, Coordinate] = {
                "prompt": batch.prompts[row],
                "guidance": batch.guidance,
                "steps": batch.steps,
                "seed": batch.seeds[row],
                **({"negative": batch.negatives[row]} if batch.negatives else {}),
                **at,
            }
            file = f"pictures/{purpose}-{digest(place)[:16]}.png"
            atomic_write_bytes(self.out / file, self._png(drawn.latents[row]))
            kept.append(Picture(file=file, at=place, purpose=purpose))
        return kept

    def picture(self, latents: Tensor) -> np.ndarray:
        """[H, W, 3] uint8: the picture of latents [C, h, w]."""
        pixels = latent_space.decode(self.vae, latents[None].to(self.vae.device))
        found: np.ndarray = latent_space.to_bytes(pixels)[0].numpy()
        return found

    def _png(self, latents: Tensor) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.picture(latents)).save(buffer, format="PNG")
        return buffer.getvalue()

"""The velocity that a sampler follows: classifier-free guidance around `model.velocity`, in one pass or in two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.flow.guidance import cfg, rescale
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity

BatchCfg = bool | Literal["auto"]


@dataclass
class GuidedVelocity:
    """A velocity callable for `flow.solve`; it counts its calls, one per step.

    Attributes:
        transformer: FLUX's.
        positive: B prompts.
        negative: B prompts; None when no call is guided.
        image_ids: see `model.velocity`.
        scale: the guidance scale; a call without guidance, as all are at 1 and below, is a single pass of `positive`.
        guided: which calls are guided; None is all.
        phi: see `flow.guidance.rescale`.
        batch_cfg: True: a guided call is one pass of 2B, shorter prompts masked; False: two passes of B; "auto": one
            pass where it needs no more padding than two, that is where both sides have the same lengths.
        embedded_guidance: see `model.velocity`.
        calls: made so far.
    """

    transformer: FluxTransformer2DModel
    positive: TextConditioning
    negative: TextConditioning | None
    image_ids: Tensor
    scale: float = 1.0
    guided: range | None = None
    phi: float = 0.0
    batch_cfg: BatchCfg = "auto"
    embedded_guidance: float | None = None
    calls: int = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """v_u + g (v_c - v_u), or v_c where nothing is guided; x [B, N, 4C] and sigma as in `model.velocity`."""
        call, self.calls = self.calls, self.calls + 1
        if self.negative is None or self.scale <= 1 or (self.guided is not None and call not in self.guided):
            return self._pass(x, sigma, self.positive)
        if self._in_one_pass(self.negative):
            both = TextConditioning.cat([self.negative, self.positive])
            v_uncond, v_cond = self._pass(torch.cat([x, x]), sigma, both).chunk(2)
        else:
            v_uncond, v_cond = self._pass(x, sigma, self.negative), self._pass(x, sigma, self.positive)
        v = cfg(v_cond, v_uncond, self.scale)
        return rescale(v, v_cond, self.phi) if self.phi else v

    def _in_one_pass(self, negative: TextConditioning) -> bool:
        if self.batch_cfg == "auto":
            return set(negative.lengths) == set(self.positive.lengths)
        return self.batch_cfg

    def _pass(self, x: Tensor, sigma: float, text: TextConditioning) -> Tensor:
        sigmas = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        return velocity(self.transformer, x, sigmas, text, self.image_ids, guidance=self.embedded_guidance)

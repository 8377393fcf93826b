"""The velocity that a sampler follows: classifier-free guidance around `model.velocity`, in one pass or in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.flow.guidance import apg, cfg, cfg_zero_star, rescale
from libreflux.model.attention_guidance import normalized_attention
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.sample.rules import GuidanceRule, Nag
from libreflux.values import is_guided

BatchCfg = bool | Literal["auto"]


@dataclass(frozen=True)
class GuidedPass:
    """One pass of a picture's transformer, before it runs.

    Attributes:
        step: index of the step, from 0.
        sigma: its noise level.
        x: latents [B, N, 4C].
        text: B prompts.
        prompted: which of the B have the prompts; the others have the negative prompts.
        run: latents and prompts -> velocity, at this noise level.
    """

    step: int
    sigma: float
    x: Tensor
    text: TextConditioning
    prompted: range
    run: Callable[[Tensor, TextConditioning], Tensor]


Watcher = Callable[[GuidedPass], Tensor]
"""Runs a pass and returns its velocity."""
_watcher: ContextVar[Watcher | None] = ContextVar("libreflux_watcher", default=None)


@contextmanager
def watched_passes(watcher: Watcher) -> Iterator[None]:
    """Within the block each pass of a picture is given to `watcher`, whatever draws the picture."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@dataclass
class GuidedVelocity:
    """The velocity that `denoise` follows.

    Attributes:
        transformer: FLUX's.
        positive: B prompts.
        negative: B prompts; None when no call is guided.
        image_ids: see `model.velocity`.
        scale: the guidance scale; a step without guidance, as all are at 0 and 1, is a single pass of `positive`.
        guided_steps: which steps are guided; None is all.
        rescale: phi, see `flow.guidance.rescale`.
        batch_cfg: True: a guided step is one pass of 2B, shorter prompts masked; False: two passes of B; "auto": one
            pass where it needs no more padding than two, that is where both sides have the same lengths.
        embedded_guidance: see `model.velocity`.
        nag: guidance within attention, of every step; it takes a pass of 2B, shorter prompts masked, for one of B.
        rule: how the two velocities become one. APG's momentum is of the steps that were called before, in turn.
    """

    transformer: FluxTransformer2DModel
    positive: TextConditioning
    negative: TextConditioning | None
    image_ids: Tensor
    scale: float = 1.0
    guided_steps: range | None = None
    rescale: float = 0.0
    batch_cfg: BatchCfg = "auto"
    embedded_guidance: float | None = None
    rule: GuidanceRule = field(default_factory=GuidanceRule)
    nag: Nag = field(default_factory=Nag)
    _average: Tensor | None = field(default=None, init=False)
    """APG's, of the step before."""

    def is_guided(self, step: int) -> bool:
        """Whether this step runs the negative prompts too."""
        chosen = self.guided_steps is None or step in self.guided_steps
        return chosen and is_guided(self.scale) and self.negative is not None

    def __call__(self, x: Tensor, sigma: float, step: int) -> Tensor:
        """What the rule makes of v_u and v_c, v_c in a step without guidance, or 0 in one that stands still.

        Args:
            x: latents [B, N, 4C].
            sigma: the noise level, see `model.velocity`.
            step: index of the step, from 0.
        """
        count = x.shape[0]
        if step < self.rule.zero_init:
            return torch.zeros_like(x)
        if self.negative is None or not self.is_guided(step):
            return self._conditional(x, sigma, step)
        if not self.nag.nag and self._in_one_pass(self.negative):
            both = TextConditioning.cat([self.negative, self.positive])
            found = self._pass(torch.cat([x, x]), sigma, both, step, range(count, 2 * count))
            v_uncond, v_cond = found.chunk(2)
        else:
            v_uncond = self._pass(x, sigma, self.negative, step, range(0))
            v_cond = self._conditional(x, sigma, step)
        v = self._guided(v_cond, v_uncond, x, sigma)
        return rescale(v, v_cond, self.rescale) if self.rescale else v

    def _conditional(self, x: Tensor, sigma: float, step: int) -> Tensor:
        count = x.shape[0]
        if not self.nag.nag or self.negative is None:
            return self._pass(x, sigma, self.positive, step, range(count))
        both = TextConditioning.cat([self.negative, self.positive])
        found = self._pass(torch.cat([x, x]), sigma, both, step, range(count, 2 * count), nag=self.nag)
        return found.chunk(2)[1]

    def _guided(self, v_cond: Tensor, v_uncond: Tensor, x: Tensor, sigma: float) -> Tensor:
        rule = self.rule
        if rule.guidance_rule == "cfg-zero":
            return cfg_zero_star(v_cond, v_uncond, self.scale)
        if rule.guidance_rule == "cfg":
            return cfg(v_cond, v_uncond, self.scale)
        v, self._average = apg(
            v_cond,
            v_uncond,
            self.scale,
            x=x,
            sigma=sigma,
            eta=rule.apg_eta,
            radius=rule.apg_radius,
            momentum=rule.apg_momentum,
            average=self._average,
        )
        return v

    def _in_one_pass(self, negative: TextConditioning) -> bool:
        if self.batch_cfg == "auto":
            return set(negative.lengths) == set(self.positive.lengths)
        return self.batch_cfg

    def _pass(
        self, x: Tensor, sigma: float, text: TextConditioning, step: int, prompted: range, nag: Nag | None = None
    ) -> Tensor:
        def run(x: Tensor, text: TextConditioning) -> Tensor:
            sigmas = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
            with _attention(self.transformer, x.shape[1], nag):
                return velocity(self.transformer, x, sigmas, text, self.image_ids, guidance=self.embedded_guidance)

        watcher = _watcher.get()
        return run(x, text) if watcher is None else watcher(GuidedPass(step, sigma, x, text, prompted, run))


def _attention(transformer: FluxTransformer2DModel, image_tokens: int, nag: Nag | None) -> AbstractContextManager[None]:
    if nag is None:
        return nullcontext()
    numbers = {"scale": nag.nag, "tau": nag.nag_tau, "alpha": nag.nag_alpha}
    return normalized_attention(transformer, image_tokens=image_tokens, **numbers)

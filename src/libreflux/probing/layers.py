"""What each layer of a model does: by how far blocks turn the hidden states, and how large gradients are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.adapter.layers import linears
from libreflux.data.batches import Batch
from libreflux.data.held_out import HeldOut
from libreflux.flow.path import interpolate, velocity_target
from libreflux.model.finite import NotFiniteError, name_of
from libreflux.model.hidden_states import State, hidden_states
from libreflux.model.numerics import pinned
from libreflux.probing.held_out import model_velocity
from libreflux.probing.layer_gradients import squared_gradients
from libreflux.probing.metrics.angles import angular_distance, centred
from libreflux.probing.metrics.measures import paired_noise

TOKENS = ("text", "image")
SPANS = (1, 2, 4, 8)


@dataclass(frozen=True)
class BlockDistances:
    """By how far n blocks in a row turn the tokens, as `angles.angular_distance`, mean over pictures.

    Attributes:
        tokens: "text" or "image".
        centred: whether the tokens' mean was taken away first.
        span: n.
        sigma: the noise level.
        values: [L + 1 - n], one for each first block; of the text NaN for what ends in the last block, whose text
            nothing reads.
    """

    tokens: str
    centred: bool
    span: int
    sigma: float
    values: np.ndarray


@dataclass(frozen=True)
class LayerTable:
    """What was measured of a model.

    Attributes:
        double: how many double blocks it has; they come first.
        single: how many single blocks.
        pictures: that the means are over.
        sigmas: the noise levels.
        distances: of the blocks.
        gradients: linear layer -> [S] fp64, root of the mean of ||dL/dW||^2 over pictures, at each sigma.
        sizes: linear layer -> (in_features, out_features), in the model's order.
    """

    double: int
    single: int
    pictures: int
    sigmas: tuple[float, ...]
    distances: tuple[BlockDistances, ...]
    gradients: Mapping[str, np.ndarray]
    sizes: Mapping[str, tuple[int, int]]

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.double + self.single

    def block_name(self, number: int) -> str:
        """ "double 3" or "single 0": a block as FLUX numbers it."""
        return f"double {number}" if number < self.double else f"single {number - self.double}"

    def distance(
        self, tokens: str, *, span: int = 1, is_centred: bool = False, sigma: float | None = None
    ) -> np.ndarray:
        """[L + 1 - span], at one noise level or, for None, their mean over all."""
        rows = [
            one.values
            for one in self.distances
            if (one.tokens, one.centred, one.span) == (tokens, is_centred, span) and sigma in (None, one.sigma)
        ]
        found: np.ndarray = np.mean(rows, axis=0)
        return found

    def gradient(self, layer: str) -> float:
        """Root of the mean of ||dL/dW||^2 over pictures and noise levels."""
        return float(np.sqrt(np.mean(self.gradients[layer] ** 2)))

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN is null."""
        return {
            "double_blocks": self.double,
            "single_blocks": self.single,
            "pictures": self.pictures,
            "sigmas": list(self.sigmas),
            "distances": [
                {
                    "tokens": one.tokens,
                    "centred": one.centred,
                    "span": one.span,
                    "sigma": one.sigma,
                    "values": [value if np.isfinite(value) else None for value in one.values.tolist()],
                }
                for one in self.distances
            ],
            "gradients": {name: values.tolist() for name, values in self.gradients.items()},
        }


def measure_layers(
    transformer: FluxTransformer2DModel,
    held_out: HeldOut,
    *,
    sigmas: Sequence[float],
    guidance: float | None = None,
    seed: int = 0,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> LayerTable:
    """Measures a transformer as it stands, adapters included; no parameter gets a gradient.

    One forward pass and its backward for each picture and noise level, one picture at a time. The loss is that of flow
    matching under the picture's caption, see `training.objective.flow_matching_loss`.

    Args:
        transformer: the network, where its weights are, frozen.
        held_out: the pictures.
        sigmas: noise levels in (0, 1).
        guidance: the value for a network with a guidance embedding, None for one without.
        seed: of the noise.
        on_sample: told how many of how many passes are done.

    Raises:
        NotFiniteError: a gradient that is NaN or infinite.
    """
    layers = linears(transformer)
    sums: dict[float, dict[tuple[str, bool, int], Tensor]] = {sigma: {} for sigma in sigmas}
    squares = {sigma: dict.fromkeys(layers, 0.0) for sigma in sigmas}
    done, total = 0, len(held_out) * len(sigmas)
    for part in held_out.batches(1):
        for sigma in sigmas:
            states, found = _one_pass(transformer, layers, part, sigma, guidance, seed)
            for key, values in block_distances(states).items():
                sums[sigma][key] = sums[sigma].get(key, torch.zeros(())) + values
            for name, square in found.items():
                squares[sigma][name] += float(square)
            done += 1
            on_sample(done, total)
    count = len(held_out)
    return LayerTable(
        double=len(transformer.transformer_blocks),
        single=len(transformer.single_transformer_blocks),
        pictures=count,
        sigmas=tuple(sigmas),
        distances=tuple(
            BlockDistances(*key, sigma, (values / count).numpy())
            for sigma in sigmas
            for key, values in sums[sigma].items()
        ),
        gradients={name: np.sqrt([squares[sigma][name] / count for sigma in sigmas]) for name in layers},
        sizes={name: (int(layer.in_features), int(layer.out_features)) for name, layer in layers.items()},  # type: ignore[arg-type]
    )


def _one_pass(
    transformer: FluxTransformer2DModel,
    layers: Mapping[str, nn.Module],
    picture: Batch,
    sigma: float,
    guidance: float | None,
    seed: int,
) -> tuple[list[State], dict[str, Tensor]]:
    """The states, and layer -> ||dL/dW||^2, of one picture at one noise level."""
    latents = picture.latents.to(transformer.device)
    noise = paired_noise(latents.shape[1:], seed, picture.sample_ids[0], sigma)[None].to(latents)
    level = torch.tensor([sigma], dtype=torch.float32, device=latents.device)
    field = model_velocity(transformer, picture.text.to(latents.device), guidance=guidance)
    with (
        hidden_states(transformer) as states,
        squared_gradients(layers) as found,
        torch.enable_grad(),
        pinned(latents.device),
    ):
        predicted = field(interpolate(latents, noise, level), level)
        (predicted - velocity_target(latents, noise)).square().sum().backward()  # of the mean, fp16 would lose it
    if bad := next((name for name, square in found.items() if not square.isfinite()), None):
        told = f"the gradient of {bad} is not finite at noise level {sigma:g}"
        hint = "use fp32 or bf16 weights, and adapters of a weight near 1"
        raise NotFiniteError(told, where=name_of(transformer), hint=hint)
    return states, {name: square / predicted.numel() ** 2 for name, square in found.items()}


def block_distances(states: Sequence[State]) -> dict[tuple[str, bool, int], Tensor]:
    """(tokens, centred, span) -> [L + 1 - span] fp64 on the CPU, mean over the tokens of one picture.

    Args:
        states: the L + 1 states of one picture, as of `hidden_states`.
    """
    found = {}
    for index, is_centred in product(range(len(TOKENS)), (False, True)):
        rows = [centred(state[index]) if is_centred else state[index] for state in states]
        for span in (span for span in SPANS if span < len(states)):
            pairs = zip(rows, rows[span:], strict=False)
            # MPS has no fp64
            values = torch.stack([angular_distance(x, y).cpu().double().mean() for x, y in pairs])
            if TOKENS[index] == "text":
                values[-1] = torch.nan
            found[TOKENS[index], is_centred, span] = values
    return found

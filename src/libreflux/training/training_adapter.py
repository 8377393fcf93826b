"""The adapter that is on a distilled model while another one is trained, frozen, and left out when the result draws.

A distilled model that is trained by plain flow matching unlearns to draw in few steps. A training adapter has unlearnt
that before, on pictures that the model drew itself. With it on, what another adapter is taught is the new pictures
alone; without it, the model draws the new pictures in its own few steps. It is a workaround that holds for short runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.adapter.adapter import Adapter
from libreflux.adapter.io import ROLE, TRAINING_ADAPTER, AdapterFile, attach_file, load_adapter
from libreflux.adapter.layers import delta_from_tensors, features, linears
from libreflux.adapter.lineage import lacking
from libreflux.errors import AdapterError, RunError
from libreflux.model.facts import Facts, trained_facts
from libreflux.places import did_you_mean
from libreflux.recipe import Recipe
from libreflux.training.callbacks import Callbacks
from libreflux.training.checkpoint import ADAPTER, Checkpoint
from libreflux.training.objective import NoisedBatch, flow_matching_loss
from libreflux.values import adapter_argument

KEY = "adapter.training_adapter"
STATE = "training_adapter"
"""In a checkpoint's state.json: the file's SHA-256; left out where there is none."""


@dataclass(frozen=True)
class TrainingAdapter:
    """A training adapter that a recipe names, read.

    Attributes:
        file: its tensors and metadata.
        weight: its strength.
    """

    file: AdapterFile
    weight: float

    def put_on(self, transformer: nn.Module, trained: Adapter, device: str) -> Adapter:
        """Attaches it over what is trained, frozen and in the base's dtype; what is trained stays so."""
        # Over it: the first values of what is trained come from the base's weights, which are then those below it.
        dtype = next(transformer.parameters()).dtype
        on = attach_file(transformer, self.file, self.weight, dtype=dtype, device=device)
        for parameter in on.parameters():
            parameter.requires_grad_(False)
        for parameter in trained.parameters():
            parameter.requires_grad_(True)
        return on

    def check_layers(self, transformer: nn.Module) -> None:
        """Raises AdapterError where its layers are not this model's; `transformer` may be on the meta device."""
        found = linears(transformer)
        for name, tensors in self.file.by_layer(found).items():
            delta_from_tensors(tensors, *features(found[name]), f"{self.file.where}, {name}")

    def check_base(self, model: str, model_hash: str, lineage: Mapping[str, Any]) -> None:
        """Raises AdapterError where it says that it was made for other weights than these.

        Args:
            model: the base's name.
            model_hash: SHA-256 of its weights.
            lineage: of its facts: what it was quantised from is as good.
        """
        made_for = self.file.metadata.get("model_hash", model_hash)
        if lacking(model_hash, lineage, self.file, []) != {}:
            name = self.file.metadata.get("model", "an unnamed model")
            what = f"was made for other weights ({made_for[:10]}, {name}) than those of {model} ({model_hash[:10]})"
            raise AdapterError(
                what, where=self.file.where, hint="make one for this model: adapter.role: training_adapter"
            )

    def check_unchanged(self, newest: Checkpoint | None) -> None:
        """Raises RunError where a run that goes on was begun with another file."""
        before = None if newest is None else newest.state().get(STATE)
        if before not in (None, self.file.sha256):
            what = f"the training adapter has changed since this run began ({before[:10]} -> {self.file.sha256[:10]})"
            raise RunError(what, where=self.file.where, hint="put the file back as it was, or choose another `out`")

    def lines(self) -> list[str]:
        """What is said of it before the first step."""
        found = [f"training adapter: {self.file.where} at weight {self.weight:g}, frozen, no part of the result"]
        if "model_hash" not in self.file.metadata:
            found.append(f"{self.file.where} does not say which model it was made for: its layers fit this one")
        elif not self.file.is_training_adapter:
            found.append(f"{self.file.where} is an ordinary adapter by its metadata, and serves as a training adapter")
        return found

    def told(self) -> dict[str, str]:
        """What the result's metadata say of it."""
        return {
            "training_adapter": Path(self.file.where).name,
            "training_adapter_sha256": self.file.sha256,
            "training_adapter_weight": f"{self.weight:g}",
        }


def read(recipe: Recipe) -> TrainingAdapter | None:
    """The training adapter of a recipe; None without one.

    Raises:
        AdapterError: there is no such file, it cannot be read, or it was made with another text padding.
    """
    if recipe.adapter.training_adapter is None:
        return None
    named, weight = adapter_argument(recipe.adapter.training_adapter)
    path = Path(named).expanduser()
    path = path / ADAPTER if (path / ADAPTER).is_file() else path
    if not path.exists():
        hint = did_you_mean(path, f"put it back, or name another file in {KEY}")
        raise AdapterError("no such training adapter", where=named, hint=hint)
    file = load_adapter(path)
    padding = file.metadata.get("text_padding", recipe.text_padding)
    if padding != recipe.text_padding:
        what = f"was made with text padding {padding}, and this recipe has {recipe.text_padding}"
        raise AdapterError(what, where=file.where, hint=f"set text_padding: {padding}, or make another one")
    return TrainingAdapter(file, weight)


def opened(recipe: Recipe, newest: Checkpoint | None, callbacks: Callbacks) -> TrainingAdapter | None:
    """`read`, compared with what the run was begun with, and told of."""
    found = read(recipe)
    if found is not None:
        found.check_unchanged(newest)
        for line in found.lines():
            callbacks.on_notice(line)
    return found


def together(adapter: Adapter, other: Adapter | None) -> Adapter:
    """Two adapters of one transformer as one, to switch them off together: what is left then is the base alone."""
    if other is None:
        return adapter
    over = {f"{name}, over": one for name, one in other.layers.items()}
    return Adapter(adapter.transformer, {**adapter.layers, **over})


def losses(
    transformer: FluxTransformer2DModel,
    on: Adapter | None,
    batch: NoisedBatch,
    regularised: Sequence[bool],
    target: Tensor,
) -> Tensor:
    """`flow_matching_loss`, with the training adapter off for regularised pictures.

    What those keep is what the result will draw, and that draws without it: only so is their loss zero while the
    trained adapter does nothing. The others are trained with it on.

    Args:
        transformer: the network with all that is on it.
        on: the training adapter; None without one.
        batch: the pictures.
        regularised: B flags.
        target: [B, h*w/4, 4C] packed.

    Returns:
        [B] fp32.
    """
    kept = [index for index, flag in enumerate(regularised) if flag]
    if on is None or not kept:
        return flow_matching_loss(transformer, batch, target=target)
    others = [index for index, flag in enumerate(regularised) if not flag]
    with on.disabled():
        found = [flow_matching_loss(transformer, batch.index(kept), target=target[kept])]
    if others:
        found.append(flow_matching_loss(transformer, batch.index(others), target=target[others]))
    place = {index: number for number, index in enumerate([*kept, *others])}
    return torch.cat(found)[[place[index] for index in range(len(batch))]]


def result_facts(facts: Facts, recipe: Recipe) -> Facts:
    """What a run's result is drawn with: with a training adapter or a guided target as the base is, else `freed_facts`.

    Both keep the base's few steps, and a guided target has its guidance in it.

    Args:
        facts: of the base.
        recipe: as resolved.
    """
    told, guided = freed_facts(facts, recipe), recipe.guided_target
    kept = recipe.adapter.training_adapter is not None or (guided is not None and not guided.neutral)
    if not kept or recipe.distil is not None:
        return told
    return dataclasses.replace(told, steps=facts.steps, guidance=told.guidance if recipe.guidance else facts.guidance)


def sample_facts(facts: Facts, recipe: Recipe) -> Facts:
    """What sample pictures on the way are drawn with: as the result, or freed where a training adapter stays on."""
    return freed_facts(facts, recipe) if recipe.samples.with_training_adapter else result_facts(facts, recipe)


def freed_facts(facts: Facts, recipe: Recipe) -> Facts:
    """Freed, or as a student draws; the embedded guidance, for a model that has one, is what it was trained at."""
    distil = recipe.distil
    told = trained_facts(
        facts, text_padding=recipe.text_padding, guidance=recipe.guidance, distilled=distil is not None
    )
    return dataclasses.replace(told, steps=distil.steps) if distil is not None and distil.steps else told


def metadata(recipe: Recipe, training_adapter: TrainingAdapter | None, world: int) -> dict[str, str]:
    """What an adapter's file says of its role, and of the training adapter that it was trained with."""
    if recipe.adapter.role == "training_adapter":
        return {ROLE: TRAINING_ADAPTER, "recipe_keys": json.dumps(recipe.decisive(world), sort_keys=True)}
    return {} if training_adapter is None else training_adapter.told()

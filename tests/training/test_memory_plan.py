"""gradient_checkpointing: auto: as many blocks keep their activations as memory has room for; the same gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from libreflux.adapter.adapter import attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.model import numerics
from libreflux.model.numerics import enable_checkpointing
from libreflux.model.offload import blocks_of, spread
from libreflux.model.text import TextConditioning
from libreflux.recipe import Recipe, load_recipe
from libreflux.training import checkpoint, memory_plan, trace
from libreflux.training.callbacks import Callbacks
from libreflux.training.estimate import estimate_recipe
from libreflux.training.loop import fit
from libreflux.training.memory_plan import affordable, fitted
from libreflux.training.objective import NoisedBatch, flow_matching_loss
from libreflux.training.phases import Estimate
from libreflux.workflows.memory_verdict import verdict
from tiny import tiny_transformer

Tree = Callable[..., dict[str, Any]]
BLOCKS = 3  # of the tiny model


class Notices(Callbacks):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_notice(self, line: str) -> None:
        self.lines.append(line)


def gradients(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[nn.Module]]:
    """Of a tiny adapted network, and the blocks that were computed under checkpointing; None: without it."""
    made, random = tiny_transformer(), torch.Generator().manual_seed(1)
    adapter = attach(made, resolve(linear_shapes(made), [Target(layers="**", factor=4)]), scale=0.1)
    blocks, checked = blocks_of(made), list[nn.Module]()
    own = numerics._checkpointed

    def noted(block: nn.Module, *given: Any) -> Any:
        checked.append(block)
        return own(block, *given)

    with monkeypatch.context() as patched:
        patched.setattr(numerics, "_checkpointed", noted)
        if kept is not None:
            enable_checkpointing(made, [blocks[index] for index in spread(kept, BLOCKS)])
        latents = torch.randn(2, 16, 4, 4, generator=random)
        text = TextConditioning([torch.randn(3, 24, generator=random)] * 2, torch.randn(2, 16, generator=random))
        noised = NoisedBatch(latents, torch.randn(latents.shape, generator=random), torch.tensor([0.2, 0.7]), text)
        flow_matching_loss(made, noised).sum().backward()
    found = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    assert any(bool(each.any()) for each in found)
    return found, [block for block in checked if block in blocks]


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_the_gradient_has_the_same_bits_however_many_blocks_are_computed_again(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, none = gradients(None, monkeypatch)
    found, checked = gradients(kept, monkeypatch)
    assert (len(none), len(checked)) == (0, BLOCKS - kept)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)


def an_estimate(**changes: Any) -> Estimate:
    rest = dict.fromkeys(("adapter", "moments", "gradient", "update", "averages", "checkpoint"), 0)
    own: dict[str, Any] = {
        "on_cpu": True,
        "weights": 500,
        "activations": 100,
        "unchecked": 1100,
        "blocks": [(100,)] * 10,
    }
    return Estimate(**rest | own | changes)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_as_many_blocks_keep_their_activations_as_fit(on_cpu: bool) -> None:
    found = an_estimate(on_cpu=on_cpu)
    reserve = 1 if on_cpu else memory_plan.CARD_RESERVE
    peaks = [reserve * found.keeping(count).training.peak for count in range(11)]
    assert peaks == sorted(peaks)
    assert [affordable(found, peak) for peak in peaks] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert affordable(found, 0) == 0
    assert affordable(found.offloaded(5), 10 * peaks[-1]) == 0  # what waits must be computed again
    assert "activations, 4 of 10 blocks kept" in found.keeping(4).table()
    assert found.keeping(0) == found


def test_the_straight_line_is_what_is_traced() -> None:
    config = dict(tiny_transformer().config) | {"num_layers": 3, "num_single_layers": 5}
    made = trace.meta_transformer(config, torch.float32)
    attach(made, resolve(linear_shapes(made), [Target(layers="**", factor=4)]), init="ones")
    blocks = blocks_of(made)
    peaks = []
    for kept in range(len(blocks) + 1):
        enable_checkpointing(made, [blocks[index] for index in spread(kept, len(blocks))])
        peaks.append(trace.trace_pass(made, 4, (16, 16), 16))
    straight = an_estimate(activations=peaks[0], unchecked=peaks[-1], blocks=[(1,)] * len(blocks))
    for kept, peak in enumerate(peaks):  # one block of eight is left free, see `affordable`
        above = straight.keeping(min(kept + 1, len(blocks))).activations
        assert peaks[0] <= peak <= above or kept == len(blocks)


@pytest.fixture
def recipe(recipe_tree: Tree, tmp_path: Path) -> Callable[..., Recipe]:
    def made(**changes: Any) -> Recipe:
        return Recipe.model_validate(recipe_tree(tmp_path / "run", gradient_checkpointing="auto", **changes))

    return made


def test_auto_is_decided_at_each_start_and_told(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = estimate_recipe(recipe(), text_tokens=512)
    room = [plain.keeping(2).training.peak]
    monkeypatch.setattr(memory_plan, "free_memory", lambda _: room[0])

    def run(steps: int) -> list[str]:
        notices = Notices()
        fit(recipe(steps=steps), notices)
        return [line for line in notices.lines if line.startswith("gradient")]

    line = "gradient_checkpointing: auto; 1 of 3 blocks keep their activations, the others are computed again"
    assert run(1) == [f"{line} (0.1 GiB are free)"]
    room[0] = 0
    assert run(2) == [line.replace("1 of", "0 of") + " (0.0 GiB are free, too few by the estimate)"]
    whole = {"steps": 2, "gradient_checkpointing": False, "out": str(tmp_path / "whole")}
    without = fit(Recipe.model_validate(recipe().resolved() | whole))
    assert without.read_bytes() == (tmp_path / "run" / without.name).read_bytes()


def test_runs_that_kept_such_a_decision_go_on(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """As versions did before: `decided` in recipe.json."""
    fit(recipe(steps=1))
    kept = tmp_path / "run" / checkpoint.RECIPE
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"decided": {"gradient_checkpointing": 1}}))
    fit(recipe(steps=2))
    fit(recipe(steps=3, accumulate=2), fork=True)
    assert "decided" not in json.loads(kept.read_text())


def test_the_bytes_of_a_run_are_those_without_checkpointing(recipe_tree: Tree, tmp_path: Path) -> None:
    notices, found = Notices(), []
    for way in (False, "auto"):
        tree = recipe_tree(tmp_path / str(way), steps=2, gradient_checkpointing=way)
        found.append(fit(Recipe.model_validate(tree), notices).read_bytes())
    assert found[0] == found[1]
    assert any(line.startswith("gradient_checkpointing: auto; 3 of 3 blocks keep") for line in notices.lines)


def test_the_dry_run_decides_as_the_run_does(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    found = estimate_recipe(recipe(), text_tokens=20)
    assert found.unchecked is not None
    assert found.unchecked > found.activations
    on, off = (
        estimate_recipe(recipe().model_copy(update={"gradient_checkpointing": way}), text_tokens=20)
        for way in (True, False)
    )
    assert (found.activations, found.unchecked) == (on.activations, off.activations)
    assert verdict(recipe(), found).estimate.kept == BLOCKS
    assert verdict(recipe(device="cuda"), found).estimate.kept == BLOCKS
    assert fitted(recipe(), found, 0).kept == 0


def test_values_of_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: [{path: p}]\nresolution: 32\nsteps: 20\nout: o\noptimizer: {warmup: 1}\n")
    for text, value in (("auto", "auto"), ("true", True), ("off", False), ("1", True)):
        assert load_recipe(path, [f"gradient_checkpointing={text}"]).gradient_checkpointing == value
    with pytest.raises(Exception, match=r"gradient_checkpointing: .*wanted true, false or auto, not 'some'"):
        load_recipe(path, ["gradient_checkpointing=some"])
    both = ["gradient_checkpointing=auto"]
    for text, number in (("auto", "auto"), ("3", 3), ("1e1", 10)):
        assert load_recipe(path, [*both, f"offload_blocks={text}"]).offload_blocks == number
    for wrong in ("-1", "1.5", "true", "many"):
        with pytest.raises(Exception, match=r"offload_blocks: .*wanted a whole number from 0, or auto"):
            load_recipe(path, [*both, f"offload_blocks={wrong}"])

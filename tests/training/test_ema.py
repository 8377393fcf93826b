"""Power-function averages against the integrals they stand for, in hindsight, in a run and from the command line."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from libreflux.adapter.adapter import attach
from libreflux.adapter.io import attach_file, load_adapter, save_adapter
from libreflux.adapter.layers import LoKr, LoRA, delta_from_tensors, delta_weight
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import RunError
from libreflux.recipe import Recipe
from libreflux.training import checkpoint, ema, hindsight
from libreflux.training.callbacks import Callbacks, StepInfo
from libreflux.training.interrupt import Interrupted
from libreflux.training.loop import fit
from tiny import tiny_transformer

STEPS = 2000


def averaged(
    signal_at: Callable[[int], float], widths: Sequence[float], steps: int = STEPS, every: int = 1
) -> dict[float, float]:
    theta = torch.zeros(1)
    averages = ema.Averages({"x": theta}, widths, every)
    for step in range(1, steps + 1):
        theta.fill_(signal_at(step))
        averages.update(step)
    return {width: averages.tensors()[ema.average_key(width, "x")].item() for width in widths}


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.72)])
def test_width_and_exponent_belong_together(width: float, gamma: float) -> None:
    assert ema.exponent(width) == pytest.approx(gamma, abs=5e-3)
    assert ema.relative_width(ema.exponent(width)) == pytest.approx(width, rel=1e-9)
    # And the width is what the paper says it is: the profile's standard deviation, measured.
    tau = (np.arange(100_000) + 0.5) / 100_000
    p = (ema.exponent(width) + 1) * tau ** ema.exponent(width)
    assert math.sqrt((p * tau**2).mean() - (p * tau).mean() ** 2) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("every", [1, 4, 10])
def test_ramp_and_jump_average_to_their_integrals(every: int) -> None:
    """theta = t: (gamma + 1) / (gamma + 2) T. theta = 1 after t0: 1 - (t0 / T)^(gamma + 1).

    The ramp is taken in as stairs of `every` steps, which lie half of that above it: their own integral is exact.
    """
    widths = [0.05, 0.1, 0.25]
    ramp, jump = (averaged(signal_at, widths, every=every) for signal_at in (float, lambda step: float(step > 1700)))
    for width in widths:
        gamma = ema.exponent(width)
        ends = np.arange(0, STEPS + 1, every) / STEPS
        assert ramp[width] == pytest.approx(STEPS * float(ends[1:] @ np.diff(ends ** (gamma + 1))), rel=1e-5)
        assert ramp[width] == pytest.approx((gamma + 1) / (gamma + 2) * STEPS, abs=0.51 * every)
        assert jump[width] == pytest.approx(1 - 0.85 ** (gamma + 1), rel=1e-4)


def test_how_often_weights_are_taken_in_does_not_matter_where_they_stand_still() -> None:
    """Weights that change every 20 steps alone: the same average, whenever between it is updated, changing it too."""

    def stairs(step: int) -> float:
        return math.sin((step - 1) // 20)

    widths = [0.05, 0.25]
    reference = averaged(stairs, widths)
    for every in (4, 10, 20):
        assert averaged(stairs, widths, every=every) == pytest.approx(reference, rel=1e-4, abs=1e-6)
    theta = torch.zeros(1)
    averages = ema.Averages({"x": theta}, widths)
    for step in range(1, STEPS + 1):
        theta.fill_(stairs(step))
        averages.every = (1, 10, 4)[step // 700]
        averages.update(step)
    assert averages.step == STEPS
    for width in widths:
        found = averages.tensors()[ema.average_key(width, "x")].item()
        assert found == pytest.approx(reference[width], rel=1e-4, abs=1e-6)


def original_average_(average: Tensor, theta: Tensor) -> None:
    """An average kept in the weights' own bf16, as trainers do: a step of 1e-3 of the way is rounded away."""
    average.lerp_(theta, 1e-3)


def test_an_average_of_bf16_weights_moves_where_one_in_bf16_stands_still() -> None:
    low = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(STEPS):
        original_average_(low, torch.full_like(low, 1.1))
    assert low.item() == 1.0
    theta = torch.ones(1, dtype=torch.bfloat16)
    averages = ema.Averages({"x": theta}, [0.1])
    for step in range(1, STEPS + 1):
        theta.fill_(1.0 if step <= 1000 else 1.1)
        averages.update(step)
    value = averages.tensors()["0.1/x"]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1.1 - 0.1 * 0.5 ** (ema.exponent(0.1) + 1), rel=2e-3)


def test_products_of_profiles_are_their_integrals() -> None:
    rows = [(700, 16.97), (1000, 6.94), (1000, 0.72), (350, 2.0)]
    tau = np.arange(200_000) * (1000 / 200_000) + 0.0025
    p = [np.where(tau < t, (g + 1) * (tau / t) ** g / t, 0.0) for t, g in rows]
    measured = [[float((a * b).mean() * 1000) for b in p] for a in p]
    np.testing.assert_allclose(ema.profile_products(rows, rows), measured, rtol=1e-4)


def test_hindsight_finds_a_tracked_average_and_comes_near_to_others() -> None:
    gammas = [ema.exponent(0.05), ema.exponent(0.1)]
    stored = [(step, gamma) for step in range(100, 2001, 100) for gamma in gammas]
    for wanted in stored[-3:]:
        weights, error = ema.hindsight_weights(stored, wanted)
        np.testing.assert_allclose(weights, [float(row == wanted) for row in stored], atol=5e-8)
        assert error < 1e-6
    for width, worst in [(0.075, 0.006), (0.15, 0.006), (0.03, 0.03), (0.25, 0.065)]:
        weights, error = ema.hindsight_weights(stored, (2000, ema.exponent(width)))
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert error < worst


def test_hindsight_differs_from_tracking_no_more_than_it_says() -> None:
    """|sum x_i a_i - a| <= error |p| |theta| (Cauchy-Schwarz), on a random walk."""
    walk = np.concatenate([[0], np.random.default_rng(0).standard_normal(STEPS).cumsum() / 30])
    theta = torch.zeros(1)
    averages, width = ema.Averages({"x": theta}, [0.05, 0.08, 0.1]), 0.08
    stored, values = [], []
    for step in range(1, STEPS + 1):
        theta.fill_(walk[step])
        averages.update(step)
        if step % 200 == 0:
            for tracked in (0.05, 0.1):
                stored.append((step, ema.exponent(tracked)))
                values.append(averages.tensors()[ema.average_key(tracked, "x")].item())
    wanted = (STEPS, ema.exponent(width))
    weights, error = ema.hindsight_weights(stored, wanted)
    norm = math.sqrt(ema.profile_products([wanted], [wanted])[0, 0])
    apart = abs(weights @ values - averages.tensors()["0.08/x"].item())
    assert apart <= error * norm * math.sqrt((walk**2).sum()) + 1e-5
    assert 0 < error < 0.02


# ---- files of a run -----------------------------------------------------------------------------------------------


def write_run(run: Path, deltas: Sequence[float], kind: str = "lokr", steps: Sequence[int] = ()) -> list[Path]:
    """Checkpoints 5, 50, 500… of a tiny adapter with random factors; `deltas` scale them."""
    paths = []
    for index, scale in enumerate(deltas):
        model = tiny_transformer()
        rows = resolve([("proj_out", 32, 64), ("x_embedder", 64, 32)], [Target(layers="**", factor=4)])
        adapter = attach(model, rows, init="ones")
        for layer in adapter.layers.values():
            if kind == "lora":
                layer.delta = LoRA(layer.in_features, layer.out_features, 3, alpha=6.0)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(1 + scale * torch.randn(parameter.shape, generator=generator))
        writers = {checkpoint.ADAPTER: lambda path, adapter=adapter: save_adapter(adapter, path, {"licence": "mine"})}
        step = steps[index] if steps else 5 * 10**index
        paths.append(checkpoint.write(run, step, writers, {}).adapter)
    return paths


def dense(tensors: dict[str, Tensor], layer: str = "lycoris_proj_out") -> Tensor:
    own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{layer}.")}
    delta: LoKr | LoRA = (
        delta_from_tensors(own, 32, 64, layer) if "proj" in layer else delta_from_tensors(own, 64, 32, layer)
    )
    return delta_weight(delta).double()


@pytest.mark.parametrize("kind", ["lokr", "lora"])
def test_lerp_weighs_the_newest_and_measures_the_gap_of_factors(tmp_path: Path, kind: str) -> None:
    files = [load_file(path) for path in write_run(tmp_path, [0.1, 0.3, 0.2], kind)]
    made = hindsight.lerp(tmp_path, 0.9)
    assert made.steps == [5, 50, 500]
    assert made.metadata["licence"] == "mine"
    assert json.loads(made.metadata["average"])["alpha"] == 0.9
    for key, tensor in made.tensors.items():
        if not key.endswith("alpha"):
            running = files[0][key].double()
            for later in files[1:]:
                running = 0.1 * running + 0.9 * later[key].double()
            torch.testing.assert_close(tensor.double(), running, rtol=1e-6, atol=1e-7)
    gaps, sizes = [], []
    for layer in ("lycoris_proj_out", "lycoris_x_embedder"):
        mean = 0.01 * dense(files[0], layer) + 0.09 * dense(files[1], layer) + 0.9 * dense(files[2], layer)
        gaps.append(float((mean - dense(made.tensors, layer)).norm()))
        sizes.append(float(dense(made.tensors, layer).norm()))
    assert made.gap == pytest.approx(math.hypot(*gaps) / math.hypot(*sizes), rel=1e-4)
    ratios = [gap / size for gap, size in zip(gaps, sizes, strict=True)]
    assert made.worst[1] == pytest.approx(max(ratios), rel=1e-4)
    assert made.gap > 1e-3


def test_lerp_of_one_and_of_alpha_one_is_the_newest(tmp_path: Path) -> None:
    paths = write_run(tmp_path, [0.1, 0.2], steps=[1000, 999])  # by number, not by order of writing
    made = hindsight.lerp(tmp_path, 1.0)
    for key, tensor in load_file(paths[0]).items():
        assert made.tensors[key].equal(tensor)
    assert made.gap == 0
    assert hindsight.lerp_weights(1, 0.3).tolist() == [1.0]
    assert hindsight.lerp_weights(3, 0.25) == pytest.approx([0.5625, 0.1875, 0.25])


class StopAt(Callbacks):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_averages_of_a_run_resume_to_the_bit_and_serve_in_hindsight(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "steps": 6,
        "optimizer": {"kind": "adamw_bf16", "learning_rate": 1e-2},
        "save": {"every": 3, "averages_every": 2},
        "ema": [0.08, 0.2],
        "adapter": {"targets": [{"layers": "transformer_blocks.**", "factor": 4}]},
    }
    fit(Recipe.model_validate(recipe_tree(tmp_path / "whole", **changes)))
    stopped = Recipe.model_validate(recipe_tree(tmp_path / "stopped", **changes))
    with pytest.raises(Interrupted):
        fit(stopped, StopAt(5))
    ema.snapshot_path(tmp_path / "stopped", 6).mkdir()  # of a life that was lost
    (tmp_path / "stopped" / "averages" / "step-9").mkdir()  # no name of ours
    fit(stopped)
    with pytest.raises(RunError, match=r"0\.1/lycoris.*hint: ask only for widths that were tracked"):
        fit(stopped.model_copy(update={"steps": 7, "ema": (0.08, 0.1)}))
    fit(stopped.model_copy(update={"steps": 7, "ema": (0.08,)}))
    last = load_file(tmp_path / "stopped" / "checkpoints" / "step-00000007" / "ema.safetensors")
    assert {key.partition("/")[0] for key in last if "/" in key} == {"0.08"}
    for name in (
        "checkpoints/step-00000006/ema.safetensors",
        *(f"averages/step-0000000{s}/ema.safetensors" for s in (2, 4, 6)),
    ):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    tracked = load_file(tmp_path / "whole" / "averages" / "step-00000004" / "ema.safetensors")
    made = hindsight.average(tmp_path / "whole", 0.2, step=4)
    assert made.steps == [2, 2, 3, 3, 4, 4]  # of a checkpoint too
    for key, tensor in made.tensors.items():
        expected = tracked[key] if key.endswith("alpha") else tracked[f"0.2/{key}"]
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    save_file(made.tensors, tmp_path / "a.safetensors", made.metadata)
    assert len(attach_file(tiny_transformer(), tmp_path / "a.safetensors").layers) > 3
    assert load_adapter(tmp_path / "a.safetensors").metadata["text_padding"] == "drop"
    with pytest.raises(RunError, match="the nearest are at 3, 4, 6"):
        hindsight.average(tmp_path / "whole", 0.1, step=5)
    with pytest.raises(RunError, match=r"width 0\.5 is not in"):
        hindsight.average(tmp_path / "whole", 0.5)
    with pytest.raises(RunError, match=r"cannot form width 0\.01"):
        hindsight.average(tmp_path / "whole", 0.01)
    for name in ("ema.safetensors", "manifest.json"):
        path = tmp_path / "whole" / "averages" / "step-00000002" / name
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
            path.write_bytes(damaged)
            with pytest.raises(RunError, match=r"averages/step-00000002/.*; hint: remove this folder"):
                hindsight.average(tmp_path / "whole", 0.2)
        path.write_bytes(whole)
    hindsight.average(tmp_path / "whole", 0.2)


def test_a_stop_between_two_updates_changes_no_bit_and_is_known_in_hindsight(
    recipe_tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "steps": 8,
        "save": {"every": 4, "averages_every": 4, "keep": 9},
        "ema": [0.1, 0.25],
        "ema_every": 4,
        "adapter": {"targets": [{"layers": "transformer_blocks.**", "factor": 4}]},
    }
    whole = Recipe.model_validate(recipe_tree(tmp_path / "whole", **changes))
    fit(whole)
    stopped = Recipe.model_validate(recipe_tree(tmp_path / "stopped", **changes))
    for step in (3, 6):
        with pytest.raises(Interrupted):
            fit(stopped, StopAt(step))
    places = {step: tmp_path / f"stopped/checkpoints/step-0000000{step}/ema.safetensors" for step in (3, 4, 6)}
    steps = []
    for path in places.values():
        with safetensors.safe_open(path, framework="pt") as file:
            steps.append(file.metadata().get("averages_step"))
    assert steps == ["0", None, "4"]  # only where it is not the checkpoint's own
    before, after = load_file(places[4]), load_file(places[6])
    assert all(after[key].equal(tensor) for key, tensor in before.items())
    made = hindsight.average(tmp_path / "stopped", 0.1)
    assert made.steps == [4, 4]
    assert json.loads(made.metadata["average"])["step"] == 4
    for key, tensor in made.tensors.items():
        torch.testing.assert_close(tensor, before[key if key.endswith("alpha") else f"0.1/{key}"], rtol=1e-5, atol=1e-7)
    with pytest.raises(RunError, match="no averages at step 6; hint: the nearest are at 4"):
        hindsight.average(tmp_path / "stopped", 0.1, step=6)
    fit(stopped)
    for name in ("checkpoints/step-00000008/ema.safetensors", "averages/step-00000004/ema.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert hindsight.average(tmp_path / "stopped", 0.1).steps == [4, 4, 8, 8]
    fit(whole.model_copy(update={"steps": 9, "ema_every": 3}))  # the recipe may change its mind; 9 comes 1 after 8
    last = load_file(tmp_path / "whole/checkpoints/step-00000009/ema.safetensors")
    weights = load_adapter(tmp_path / "whole/adapter.safetensors").tensors
    kept = load_file(tmp_path / "whole/checkpoints/step-00000008/ema.safetensors")
    for key, tensor in last.items():
        width, _, name = key.rpartition("/")
        if width:
            beta = ema.decay(9, ema.exponent(float(width)))
            assert tensor.equal(kept[key].lerp(weights[name].float(), 1 - beta)), key


def test_averages_that_do_not_fit_are_refused() -> None:
    averages = ema.Averages({"x": torch.zeros(2)}, [0.1])
    for wrong in ({}, {"0.1/x": torch.zeros(3)}, {"0.1/x": torch.zeros(2, dtype=torch.bfloat16)}):
        with pytest.raises(RunError, match=r"0\.1/x"):
            averages.load(wrong, 1)


def test_a_run_without_averages_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, [0.1])
    with pytest.raises(RunError, match=r"keeps no averages; hint: train with ema"):
        hindsight.average(tmp_path, 0.1)
    with pytest.raises(RunError, match="no such run folder"):
        hindsight.lerp(tmp_path / "none", 0.1)
    with pytest.raises(RunError, match=r"not in \(0, 1\]"):
        hindsight.lerp(tmp_path, 0.0)


def test_a_checkpoint_of_nan_is_named_and_nothing_is_averaged(tmp_path: Path) -> None:
    write_run(tmp_path, [0.1, math.nan, 0.1])
    with pytest.raises(RunError, match=r"step-00000050/adapter\.safetensors: lycoris_.* is not finite; hint: remove"):
        hindsight.lerp(tmp_path, 0.2)

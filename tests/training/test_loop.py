"""fit() on a real tiny model: what it learns, what a step is, how it resumes, what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from libreflux import files
from libreflux.adapter.io import attach_file
from libreflux.data.held_out import HeldOut
from libreflux.data.order import step_plan
from libreflux.data.prepare import prepare_recipe
from libreflux.errors import AdapterError, RunError
from libreflux.flow.sigmas import beta_cdf
from libreflux.model.opening import open_model
from libreflux.model.source import weights_hash
from libreflux.recipe import Recipe, SigmaSpec
from libreflux.training import checkpoint
from libreflux.training.callbacks import Callbacks, Started, StepInfo
from libreflux.training.interrupt import Interrupted
from libreflux.training.loop import fit, open_for_training
from libreflux.training.objective import NoisedBatch, flow_matching_loss, keyed_noise
from libreflux.training.ranks import Ranks
from libreflux.training.step import accumulate_gradient, draw_sigmas

PICTURES = 5
Tree = Callable[..., dict[str, Any]]


class Recorder(Callbacks):
    """Keeps everything it is told, in order; `at` maps an event, e.g. ("save", 2), to something to do in it."""

    def __init__(self, at: dict[tuple[str, int], Callable[[], object]] | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.steps: list[StepInfo] = []
        self.started: Started | None = None
        self.at = at or {}

    def tell(self, event: str, step: int) -> None:
        self.events.append((event, step))
        self.at.get((event, step), lambda: None)()

    def on_start(self, started: Started) -> None:
        self.started = started
        self.tell("start", started.step)

    def on_step(self, info: StepInfo) -> None:
        self.steps.append(info)
        self.tell("step", info.step)

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        self.tell("sample", step)

    def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: HeldOut) -> None:
        self.tell("measure", step)

    def on_save(self, step: int, folder: Path) -> None:
        self.tell("save", step)


def _fit(tree: dict[str, Any], **at: Any) -> tuple[Recorder, Path]:
    recorder = Recorder(**at)
    return recorder, fit(Recipe.model_validate(tree), recorder)


# ---- what it learns -----------------------------------------------------------------------------------------------


def _held_out_loss(transformer: FluxTransformer2DModel, tree: dict[str, Any]) -> float:
    """Mean loss over every picture at 12 noises and sigmas that no training step draws."""
    batches, _ = prepare_recipe(Recipe.model_validate(tree))
    [unit] = step_plan(0, 0, batches.samples, 1, PICTURES, 1)
    batch, total = batches.batch(unit), 0.0
    for draw in range(12):
        noise = torch.stack([keyed_noise(batch.latents.shape[1:], 0, "held out", i, draw) for i in range(PICTURES)])
        sigma = draw_sigmas(SigmaSpec(), PICTURES, 999, draw)
        with torch.no_grad():
            total += float(flow_matching_loss(transformer, NoisedBatch(batch.latents, noise, sigma, batch.text)).mean())
    return total / 12


def test_training_lowers_the_loss_at_noise_it_never_saw(
    recipe_tree: Tree, tmp_path: Path, tiny_model_dir: Path
) -> None:
    tree = recipe_tree(tmp_path / "run", steps=40, optimizer={"kind": "adamw", "learning_rate": 1e-2})
    _, adapter = _fit(tree)
    transformer = open_model(tiny_model_dir).load_transformer()
    assert transformer is not None
    before = _held_out_loss(transformer, tree)
    attach_file(transformer, adapter)
    after = _held_out_loss(transformer, tree)
    assert after < 0.9 * before, (before, after)


def test_only_the_adapter_is_trained_and_the_file_says_of_what(
    recipe_tree: Tree, tmp_path: Path, tiny_model_dir: Path
) -> None:
    before = weights_hash(tiny_model_dir)
    tree = recipe_tree(tmp_path / "run", steps=2)
    recorder, adapter = _fit(tree)
    assert weights_hash(tiny_model_dir) == before
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == str(tiny_model_dir)
    assert metadata["model_hash"] == before
    assert metadata["step"] == "2"
    assert metadata["text_padding"] == "drop"
    assert metadata["recipe"] == Recipe.model_validate(tree).fingerprint()
    assert recorder.started is not None
    attached = attach_file(open_model(tiny_model_dir).load_transformer(), adapter)
    assert sorted(attached.layers) == sorted(row.name for row in recorder.started.resolved)


# ---- what a step is -----------------------------------------------------------------------------------------------


def test_a_step_is_the_weighted_mean_of_its_pictures_gradients(recipe_tree: Tree, tmp_path: Path) -> None:
    """Ten samples of two sources by 2 x 2, each picture alone through autograd as the reference."""
    path = recipe_tree(tmp_path / "run")["data"][0]["path"]
    sources = [{"path": path, "loss_weight": 0.5}, {"path": path, "prefix": "b ", "loss_weight": 2.0}]
    optimizer = {"kind": "adamw", "learning_rate": 1e-3, "clip": None}
    tree = recipe_tree(tmp_path / "run", data=sources, accumulate=2, optimizer=optimizer)
    recipe = Recipe.model_validate(tree)
    training = open_for_training(recipe, tmp_path / "run", None, Callbacks(), Ranks(), "cpu")
    for step in range(3):
        units = step_plan(0, step, training.batches.samples, 1, 2, 2)
        sigmas, losses = draw_sigmas(recipe.sigmas, units[0].total, 0, step), []
        for unit in units:
            for item, visit, slot in zip(unit.items, unit.visits, unit.slots, strict=True):
                one = training.batches.batch(replace(unit, items=(item,), visits=(visit,), slots=(slot,)))
                noise = keyed_noise(one.latents.shape[1:], 0, one.sample_ids[0], step, slot)[None]
                noised = NoisedBatch(one.latents, noise, sigmas[[slot]], one.text)
                loss = flow_matching_loss(training.transformer, noised)
                losses.append(loss.sum() * (0.5 if item < PICTURES else 2.0))
        parameters = list(training.adapter.parameters())
        gradient = torch.autograd.grad(torch.stack(losses).sum() / len(losses), parameters)
        expected = torch.cat([each.flatten() for each in gradient]).norm()
        assert training.take_step().gradient_norm == pytest.approx(float(expected), rel=1e-4)


def test_an_epoch_shows_every_picture_once(recipe_tree: Tree, tmp_path: Path) -> None:
    recorder, _ = _fit(recipe_tree(tmp_path / "run", steps=6))  # 5 pictures by 2: three steps an epoch
    for epoch in (0, 1):
        shown = [name for step in recorder.steps if step.epoch == epoch for name in step.sample_ids]
        assert len(shown) == len(set(shown)) == PICTURES


def test_the_loss_told_is_the_mean_over_the_steps_pictures(recipe_tree: Tree, tmp_path: Path) -> None:
    recorder, _ = _fit(recipe_tree(tmp_path / "run", steps=3, accumulate=2))
    for step in recorder.steps:
        assert len(step.losses) == len(step.sigmas) == len(step.sample_ids)
        assert step.loss == pytest.approx(sum(step.losses) / len(step.losses))


@pytest.mark.parametrize("count", [1, 3, 16])
def test_one_sigma_per_stratum_also_in_a_short_step(count: int) -> None:
    spec = SigmaSpec()
    for step in range(5):
        sigmas = draw_sigmas(spec, count, 3, step)
        strata = (beta_cdf(sigmas.double(), 2.0, 2.0) * count).floor().clamp(max=count - 1)
        assert sorted(strata.int().tolist()) == list(range(count))
        assert torch.equal(sigmas, draw_sigmas(spec, count, 3, step))
    assert not torch.equal(draw_sigmas(spec, count, 3, 0), draw_sigmas(spec, count, 4, 0))


def test_independent_and_uniform_laws_are_obeyed() -> None:
    loose = draw_sigmas(SigmaSpec(stratified=False), 8, 0, 0)
    strata = (beta_cdf(loose.double(), 2.0, 2.0) * 8).floor().int().tolist()
    assert sorted(strata) != list(range(8))
    uniform = draw_sigmas(SigmaSpec(law="uniform"), 1000, 0, 0)
    assert float((uniform.sort().values - torch.linspace(0, 1, 1000)).abs().max()) < 2e-3  # one per thousandth
    shifted = draw_sigmas(SigmaSpec(law="logit-normal", mean=1.0, shift=3.0, uniform_floor=0.2), 1000, 0, 0)
    z = (torch.logit(shifted.double() / (3 - 2 * shifted.double())) - 1).sort().values
    ranks = 0.8 * torch.special.ndtr(z) + 0.2 * shifted.double().sort().values
    assert float((ranks - torch.linspace(0, 1, 1000)).abs().max()) < 2e-3


def test_gradient_norms_of_layer_groups_are_written_on_request(recipe_tree: Tree, tmp_path: Path) -> None:
    recorder, _ = _fit(recipe_tree(tmp_path / "run", steps=1, gradient_norms=True))
    [info] = recorder.steps
    line = json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())
    assert info.group_norms is not None
    assert info.gradient_norm is not None
    assert line["gradient_norms"] == info.group_norms
    assert "single_transformer_blocks.*.attn.to_q" in info.group_norms  # of both single blocks
    assert math.hypot(*info.group_norms.values()) == pytest.approx(info.gradient_norm, rel=1e-9)
    assert min(info.group_norms.values()) >= 0
    assert max(info.group_norms.values()) < info.gradient_norm


def test_gradients_are_summed_in_fp32() -> None:
    """1 + 8 x 2^-9: each summand is half a unit of bf16 at 1 and would vanish."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16)), torch.nn.Parameter(torch.zeros(3))]
    total = torch.zeros(7)
    for value in [1.0, *[2.0**-9] * 8]:
        parameters[0].grad = torch.full((2, 2), value, dtype=torch.bfloat16)
        accumulate_gradient(total, parameters)
        assert parameters[0].grad is None
    assert total.tolist() == [1 + 2**-6] * 4 + [0.0] * 3


# ---- how it resumes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "threads", "base"), [("adamw", 1, "bf16"), ("adamw_bf16", 2, "int8")])
def test_stopped_runs_resume_to_the_bit(recipe_tree: Tree, tmp_path: Path, kind: str, threads: int, base: str) -> None:
    changes: dict[str, Any] = {
        "threads": threads,
        "steps": 3,
        "base": base,
        "save": {"every": 100},
        "optimizer": {"kind": kind, "learning_rate": 1e-2, "schedule": "linear"},
    }
    _, expected = _fit(recipe_tree(tmp_path / "whole", **changes))
    torch.manual_seed(12345)  # the global generator is nobody's business
    stopped = recipe_tree(tmp_path / "stopped", **changes)
    for step, signum in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(Interrupted) as stop:
            _fit(stopped, at={("step", step): lambda signum=signum: os.kill(os.getpid(), signum)})
        assert (stop.value.step, stop.value.exit_code) == (step, 128 + signum)
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
        newest = checkpoint.latest(tmp_path / "stopped")
        assert newest is not None
        assert newest.step == step
        assert not (tmp_path / "stopped" / checkpoint.ADAPTER).exists()
        saved = {**load_file(newest.adapter), **load_file(newest.optimizer)}
        assert all(".lokr_w" in name or name.endswith(".alpha") or name == "step" for name in saved)  # no base weight
    recorder, resumed = _fit(stopped)
    assert recorder.events[0] == ("start", 2)
    assert resumed.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("moment", [("sample", 0), ("sample", 2), ("save", 2), ("sample", 3), ("step", 4)])
def test_a_signal_at_any_moment_saves_once_and_loses_nothing(
    recipe_tree: Tree, tmp_path: Path, moment: tuple[str, int]
) -> None:
    tree = recipe_tree(tmp_path / "run", steps=4, samples={"every": 1, "at_start": True, "prompts": ["a fox"]})
    interrupted = Recorder(at={moment: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    if moment == ("step", 4):  # nothing is left to stop
        assert fit(Recipe.model_validate(tree), interrupted).is_file()
        return
    with pytest.raises(Interrupted) as stop:
        fit(Recipe.model_validate(tree), interrupted)
    assert stop.value.step == moment[1]
    newest = checkpoint.latest(tmp_path / "run")
    assert (newest.step if newest else 0) == moment[1]
    recorder, _ = _fit(tree)
    done = [step for event, step in interrupted.events + recorder.events if event == "step"]
    assert done == [1, 2, 3, 4]


def test_a_longer_run_is_the_continued_shorter_one(recipe_tree: Tree, tmp_path: Path) -> None:
    _, whole = _fit(recipe_tree(tmp_path / "whole", steps=5))
    _fit(recipe_tree(tmp_path / "grown", steps=3))
    recorder, grown = _fit(recipe_tree(tmp_path / "grown", steps=5))
    assert recorder.events[0] == ("start", 3)
    assert grown.read_bytes() == whole.read_bytes()
    recorder, again = _fit(recipe_tree(tmp_path / "grown", steps=5))
    assert recorder.events == []  # done is done: nothing is loaded
    assert again.read_bytes() == whole.read_bytes()
    with pytest.raises(RunError, match="step 5 is done already"):
        _fit(recipe_tree(tmp_path / "grown", steps=4))


def test_a_damaged_checkpoint_costs_its_steps_not_the_run(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path / "run", steps=4)
    _, expected = _fit(tree)
    result = expected.read_bytes()
    expected.unlink()
    last = checkpoint.step_folder(tmp_path / "run", 4)
    (last / checkpoint.OPTIMIZER).write_bytes((last / checkpoint.OPTIMIZER).read_bytes()[:-7])
    recorder, again = _fit(tree)
    assert recorder.events[:2] == [("start", 2), ("step", 3)]
    assert again.read_bytes() == result
    lines = [json.loads(line) for line in (tmp_path / "run" / checkpoint.METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_seed_and_seed_alone_decides(recipe_tree: Tree, tmp_path: Path) -> None:
    _, one = _fit(recipe_tree(tmp_path / "one", steps=2))
    _, other = _fit(recipe_tree(tmp_path / "other", steps=2, seed=1))
    first, second = load_file(one), load_file(other)
    assert all(not torch.equal(first[name], second[name]) for name in first if name.endswith("lokr_w2"))


# ---- who is told what ---------------------------------------------------------------------------------------------


def test_events_come_in_order_and_samples_follow_their_checkpoint(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(
        tmp_path / "run",
        steps=5,
        save={"every": 2, "keep": 1},
        samples={"every": 3, "at_start": True, "prompts": ["a fox"]},
    )
    recorder, _ = _fit(tree)
    steps = [("step", step) for step in range(1, 6)]
    assert recorder.events == [
        ("start", 0),
        ("sample", 0),
        steps[0],
        steps[1],
        ("save", 2),
        steps[2],
        ("sample", 3),
        steps[3],
        ("save", 4),
        steps[4],
        ("save", 5),
    ]
    assert [found.step for found in checkpoint.listed(tmp_path / "run")] == [5]
    metrics = [json.loads(line) for line in (tmp_path / "run" / checkpoint.METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in metrics] == [(info.step, info.loss) for info in recorder.steps]
    assert {"gradient_norm", "learning_rate", "pictures_per_second", "epoch"} <= set(metrics[0])


def test_a_resumed_run_draws_the_samples_that_a_kill_may_have_cost(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path / "run", steps=4, samples={"every": 2, "prompts": ["a fox"]})
    with pytest.raises(Interrupted):
        _fit(tree, at={("step", 2): lambda: os.kill(os.getpid(), signal.SIGTERM)})
    recorder, _ = _fit(tree)
    assert recorder.events[:3] == [("start", 2), ("sample", 2), ("step", 3)]


def test_held_out_pictures_are_measured_and_never_trained_on(recipe_tree: Tree, tmp_path: Path, share: float) -> None:
    tree = recipe_tree(tmp_path / "run", steps=5, held_out={"share": share, "every": 2}, save={"every": 4})
    recorder, _ = _fit(tree)
    assert recorder.started is not None
    assert recorder.started.held_out is not None
    [apart] = recorder.started.held_out.sample_ids
    shown = {name for info in recorder.steps for name in info.sample_ids}
    assert len(shown) == PICTURES - 1
    assert apart not in shown
    steps = [("step", step) for step in range(1, 6)]
    assert recorder.events == [
        ("start", 0),
        ("measure", 0),
        steps[0],
        steps[1],
        ("measure", 2),
        steps[2],
        steps[3],
        ("save", 4),
        ("measure", 4),
        steps[4],
        ("save", 5),
        ("measure", 5),
    ]
    with pytest.raises(RunError, match=r"held_out\.share"):
        _fit({**tree, "steps": 6, "held_out": {}})


# ---- what it refuses ----------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_refused_before_anything_is_loaded(recipe_tree: Tree, tmp_path: Path) -> None:
    _fit(recipe_tree(tmp_path / "run", steps=2))
    with pytest.raises(RunError, match=r"batch \(2 -> 1\), seed \(0 -> 9\)"):
        _fit(recipe_tree(tmp_path / "run", steps=4, batch=1, seed=9))


def test_changed_data_is_refused(recipe_tree: Tree, tmp_path: Path, pictures_dir: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    _fit(recipe_tree(tmp_path / "run", steps=2, data=[{"path": str(folder)}]))
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(RunError, match="pictures, captions or encoders have changed"):
        _fit(recipe_tree(tmp_path / "run", steps=4, data=[{"path": str(folder)}]))


def test_a_changed_base_is_refused(recipe_tree: Tree, tmp_path: Path) -> None:
    from tiny import make_tiny_model, tiny_transformer

    model = make_tiny_model(tmp_path / "model")
    _fit(recipe_tree(tmp_path / "run", steps=2, model=str(model)))
    tiny_transformer(seed=1).save_pretrained(model / "transformer")
    with pytest.raises(RunError, match="weights of the base model have changed"):
        _fit(recipe_tree(tmp_path / "run", steps=4, model=str(model)))


def test_a_run_folder_in_use_is_refused_at_once(recipe_tree: Tree, tmp_path: Path) -> None:
    with files.lock(tmp_path / "run"), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        _fit(recipe_tree(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [files.LOCK]


def test_the_thread_count_is_given_back(recipe_tree: Tree, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    recorder = Recorder(at={("step", 1): lambda: counts.append(torch.get_num_threads())})
    counts: list[int] = []
    fit(Recipe.model_validate(recipe_tree(tmp_path / "run", steps=1, threads=1)), recorder)
    assert (counts, torch.get_num_threads()) == ([1], 2)


def test_a_world_without_a_launcher_is_refused(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="start it by torchrun"):
        _fit(recipe_tree(tmp_path / "run"))


def test_eight_bit_moments_are_refused_at_once_without_cuda(recipe_tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"adamw_8bit: 8-bit moments need a CUDA device; hint: use adamw_bf16"):
        _fit(recipe_tree(tmp_path / "run", optimizer={"kind": "adamw_8bit"}))
    assert not (tmp_path / "cache").exists()


def test_a_misspelt_pattern_is_refused_before_preparing_and_can_be_mended(recipe_tree: Tree, tmp_path: Path) -> None:
    wrong = {"targets": [{"layers": "transformer_block.**", "factor": 4}]}
    with pytest.raises(AdapterError, match="matches no linear layer"):
        _fit(recipe_tree(tmp_path / "run", adapter=wrong))
    assert not (tmp_path / "cache").exists()
    assert checkpoint.listed(tmp_path / "run") == []
    _, adapter = _fit(recipe_tree(tmp_path / "run", steps=1))  # the mended recipe is not "changed": nothing had begun
    assert adapter.is_file()


# ---- other adapters -----------------------------------------------------------------------------------------------


def test_a_lora_learns_and_another_run_goes_on_from_its_file(
    recipe_tree: Tree, tmp_path: Path, tiny_model_dir: Path
) -> None:
    lora = {"kind": "lora", "rank": 4, "targets": [{"layers": "**.attn.**"}, {"layers": "proj_out"}]}
    tree = recipe_tree(tmp_path / "lora", adapter=lora, steps=30, optimizer={"kind": "adamw", "learning_rate": 1e-2})
    recorder, adapter = _fit(tree)
    assert recorder.started is not None
    assert recorder.started.start_norm == 0
    transformer = open_model(tiny_model_dir).load_transformer()
    assert transformer is not None
    before = _held_out_loss(transformer, tree)
    attach_file(transformer, adapter)
    assert _held_out_loss(transformer, tree) < 0.97 * before
    onwards = {"kind": "lora", "init_from": str(adapter)}
    recorder, longer = _fit(recipe_tree(tmp_path / "onwards", adapter=onwards, steps=1))
    assert recorder.started is not None
    assert recorder.started.start_norm is not None
    assert recorder.started.start_norm > 1e-3
    first, second = load_file(adapter), load_file(longer)
    assert first.keys() == second.keys()
    moved = max(float((first[key] - second[key]).abs().max()) for key in first)
    assert 0 < moved <= 1.1e-3  # one step of 1e-3 away from the file

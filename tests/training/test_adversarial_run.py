"""Students that learn from an adversary, as runs: resumed to the bit, refused, skipped, counted, on two processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libreflux.adapter.io import load_adapter
from libreflux.data.prepare import prepare_recipe
from libreflux.errors import RecipeError, RunError
from libreflux.recipe import AdversarialSpec, Recipe, load_recipe
from libreflux.training import adversary as adversary_module
from libreflux.training import checkpoint, estimate, trace
from libreflux.training.adversary import Adversary, renoise_sigmas
from libreflux.training.estimate import estimate_recipe
from libreflux.training.interrupt import Interrupted
from libreflux.training.live_bytes import LiveBytes
from libreflux.training.loop import fit
from libreflux.training.step import Training
from model.bases import adapted, based
from tiny import poison_latents
from training.recorded import Tree, recorded_fit
from training.test_adversary import pictures
from training.test_compiled import trained

ADVERSARIAL: dict[str, Any] = {
    "objective": "distil",
    "distil": {"steps": 4, "adversarial": {"width": 8, "learning_rate": 2e-3, "warmup": 2}},
}
SAVED = ("adapter", "optimizer", "heads", "heads_optimizer")


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / checkpoint.METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "pictures_per_second"} for line in found]


@pytest.mark.parametrize(("kind", "base", "checkpointing"), [("adamw", "fp32", False), ("adamw_bf16", "int8", True)])
def test_a_stopped_run_resumes_to_the_bit(
    recipe_tree: Tree, tmp_path: Path, kind: str, base: str, checkpointing: bool
) -> None:
    changes = {
        **ADVERSARIAL,
        "base": base,
        "gradient_checkpointing": checkpointing,
        "accumulate": 2,
        "steps": 5,
        "save": {"every": 5},
        "optimizer": {"kind": kind, "learning_rate": 1e-3},
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    recorder, result = recorded_fit(recipe_tree(whole, **changes))
    torch.manual_seed(99)
    with pytest.raises(Interrupted):
        recorded_fit(recipe_tree(stopped, **changes), at={("step", 3): lambda: os.kill(os.getpid(), signal.SIGTERM)})
    recorded_fit(recipe_tree(stopped, **changes))
    ends = [checkpoint.step_folder(run, 5) for run in (whole, stopped)]
    for name in SAVED:
        one, other = ((end / f"{name}.safetensors").read_bytes() for end in ends)
        assert one == other, name
    assert lines(stopped) == lines(whole)
    # The heads are in the checkpoint alone, and moved.
    assert not any("head" in name for name in load_adapter(result).tensors)
    assert load_adapter(result).metadata["sampling_steps"] == "4"
    early, late = (load_file(checkpoint.step_folder(stopped, step) / "heads.safetensors") for step in (3, 5))
    assert all(not torch.equal(early[name], late[name]) for name in early if name.endswith("weight"))
    assert int(load_file(ends[0] / "heads_optimizer.safetensors")["step"]) == 5
    # What is told.
    first, last = lines(whole)[0], lines(whole)[-1]
    assert first["discriminator_loss"] == pytest.approx(2.0)
    assert first["adversarial_loss"] == first["loss"] == 0
    assert last["loss"] == pytest.approx(last["adversarial_loss"]) != 0
    assert {"penalty", "reconstruction_loss", "spread_ratio", "heads_gradient_norm"} < set(last)
    assert [set(info.sigmas) <= {0.25, 0.5} for info in recorder.steps][:2] == [True, True]
    assert {sigma for info in recorder.steps[2:] for sigma in info.sigmas} <= {0.25, 0.5, 0.75, 1.0}
    assert recorder.steps[3].adversary is not None
    # Of pure noise apart, where some picture of the step begins there.
    for info, line in zip(recorder.steps, lines(whole), strict=True):
        assert ("spread_ratio_on_noise" in line) == ("adversarial_loss_on_noise" in line) == (1.0 in info.sigmas)
        of_noise = [loss for loss, sigma in zip(info.losses, info.sigmas, strict=True) if sigma == 1]
        assert line.get("adversarial_loss_on_noise") == pytest.approx(
            sum(of_noise) / len(of_noise) if of_noise else None
        )
    assert "spread_ratio_on_noise" in last


def test_a_student_may_begin_from_a_regression_and_a_checkpoint_without_heads_is_no_start(
    recipe_tree: Tree, tmp_path: Path
) -> None:
    regression = {"objective": "distil", "distil": {"guidance": 3.0, "steps": 4}, "steps": 1}
    started = fit(Recipe.model_validate(recipe_tree(tmp_path / "regression", **regression)))
    assert not any(path.name.startswith("heads") for path in (tmp_path / "regression").rglob("*"))
    assert "discriminator_loss" not in lines(tmp_path / "regression")[0]
    changes = {**ADVERSARIAL, "steps": 3, "adapter": {"init_from": str(started)}}
    fit(Recipe.model_validate(recipe_tree(tmp_path / "adversarial", **changes)))
    assert lines(tmp_path / "adversarial")[-1]["heads_gradient_norm"] > 0
    wrong = [
        (tmp_path / "regression", {**ADVERSARIAL, "steps": 3}, "no heads of an adversary"),
        (tmp_path / "adversarial", {**regression, "steps": 4, "adapter": changes["adapter"]}, "recipe wants none"),
    ]
    for run, others, told in wrong:
        with pytest.raises(RunError, match="distil"):  # as for every other key
            fit(Recipe.model_validate(recipe_tree(run, **others)))
        with pytest.raises(RunError, match=told):
            fit(Recipe.model_validate(recipe_tree(run, **others)), fork=True)
    wider = {**changes, "steps": 4, "distil": {"steps": 4, "adversarial": {"width": 12}}}
    with pytest.raises(RunError, match="not those of the recipe"):
        fit(Recipe.model_validate(recipe_tree(tmp_path / "adversarial", **wider)), fork=True)
    gentler = {**changes, "steps": 4, "distil": {"steps": 4, "adversarial": {"width": 8, "penalty": 1.0}}}
    fit(Recipe.model_validate(recipe_tree(tmp_path / "adversarial", **gentler)), fork=True)


def test_a_step_that_is_not_finite_moves_neither_side(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path / "run", **ADVERSARIAL, steps=3, batch=5, save={"every": 1, "keep": 9}, max_skipped=9)
    prepare_recipe(Recipe.model_validate(tree))
    [poisoned] = poison_latents(tmp_path / "cache", 1)
    recorder, _ = recorded_fit(tree)
    assert [list(info.at_fault) for info in recorder.steps] == [[poisoned]] * 3
    assert all(info.adversary is None for info in recorder.steps)
    folders = [checkpoint.step_folder(tmp_path / "run", step) for step in (1, 3)]
    for name in SAVED:
        one, other = (load_file(folder / f"{name}.safetensors") for folder in folders)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_heads_with_a_gradient_that_is_not_finite_skip_the_step(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adversary, "norm", lambda _: float("nan"))
    recorder, _ = recorded_fit(recipe_tree(tmp_path / "run", **ADVERSARIAL, steps=3))
    assert [info.at_fault for info in recorder.steps] == [["heads of the adversary"]] * 3
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [["heads of the adversary"]] * 3
    told = r"3 steps in a row.*with the heads of the adversary; hint: raise distil\.adversarial\.penalty, .*"
    with pytest.raises(RunError, match=told + r"a lower distil\.adversarial\.learning_rate"):
        fit(Recipe.model_validate(recipe_tree(tmp_path / "short", **ADVERSARIAL, steps=3, max_skipped=3)))
    heads = load_file(checkpoint.step_folder(tmp_path / "run", 3) / "heads.safetensors")
    assert not any(bool(tensor.any()) for name, tensor in heads.items() if "verdict" in name)


def test_heads_whose_weights_are_not_finite_are_never_kept(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(adversary: Adversary) -> float:
        adversary.gradient[0] = float("nan")
        return 1.0

    monkeypatch.setattr(Adversary, "norm", spoilt)
    told = r"step 1 made weights of the heads of the adversary .*hint: .*distil\.adversarial\.learning_rate"
    with pytest.raises(RunError, match=told):
        fit(Recipe.model_validate(recipe_tree(tmp_path / "run", **ADVERSARIAL, steps=3)))


def test_processes_whose_heads_differ_are_noticed() -> None:
    transformer = based("fp32")
    adapter, adversary = adapted(transformer), Adversary(AdversarialSpec(), transformer, 0, "cpu")
    told: list[list[str]] = []

    def gather(digests: list[str]) -> list[list[str]]:
        told.append(digests)
        return told

    ranks = SimpleNamespace(world=2, gather=gather)
    training: Any = SimpleNamespace(adapter=adapter, adversary=adversary, ranks=ranks, step=1, run="run")
    Training.require_replicas(training)
    Training.require_replicas(training)
    with torch.no_grad():
        adversary.parameters[-1].add_(1e-6)
    with pytest.raises(RunError, match="the adversary's heads of the processes differ after step 1"):
        Training.require_replicas(training)
    del told[:]
    Training.require_replicas(training)
    with torch.no_grad():
        next(iter(adapter.parameters())).add_(1e-3)
    with pytest.raises(RunError, match="the adapters of the processes differ after step 1"):
        Training.require_replicas(training)


def _overrides(*others: str) -> list[str]:
    common = ["data.0.path=x", "resolution=128", "steps=9", "out=o", "objective=distil"]
    return [*common, *(others or ["distil={steps: 4, adversarial: {}}"])]


@pytest.mark.parametrize(
    ("distil", "told"),
    [
        ("{adversarial: {}}", "adversarial needs steps"),
        ("{steps: 4, guidance: 3, adversarial: {}}", "guidance does nothing under adversarial"),
        ("{steps: 4, substeps: 8, adversarial: {}}", "substeps does nothing under adversarial"),
        ("{steps: 4, adversarial: {warmup: 9}}", "warmup 9 would fill all of steps 9"),
        ("{steps: 1, adversarial: {warmup: 3}}", "warmup does nothing with one step"),
        ("{steps: 1, adversarial: {rungs: [1]}}", "rungs does nothing with one step"),
        ("{steps: 4, adversarial: {rungs: [1, 1]}}", "rungs has 2 weights for steps 4"),
        ("{steps: 2, adversarial: {rungs: [1, 0]}}", "rungs.1"),
        ("{steps: 4, adversarial: {blocks: [1, 1]}}", "the same block is given twice"),
        ("{steps: 4, adversarial: {blocks: []}}", "adversarial.blocks"),
        ("{steps: 4, adversarial: {penatly: 1}}", "penalty"),
        ("{steps: 4, adversarial: }", r"adversarial.*write adversarial: \{\} for an adversary by its defaults"),
    ],
)
def test_what_would_do_nothing_is_refused(distil: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(None, _overrides(f"distil={distil}"))


def test_laws_of_sigma_are_refused_beside_the_rungs_that_take_their_place() -> None:
    with pytest.raises(RecipeError, match=r"sigmas does nothing under distil\.adversarial, where rungs weighs"):
        load_recipe(None, [*_overrides(), "sigmas.shift=3"])
    regression = ["distil={steps: 4}", "sigmas.shift=3"]
    assert load_recipe(None, _overrides(*regression)).sigmas.shift == 3


def test_a_user_who_measures_held_out_pictures_is_told_what_an_adversary_does_to_them(
    recipe_tree: Tree, tmp_path: Path
) -> None:
    held_out = {"share": 0.4, "every": 9, "pictures": 1}
    student = trained(recipe_tree(tmp_path / "student", **ADVERSARIAL, steps=3, held_out=held_out))
    assert [line for line in student.notices if "held-out" in line] == [adversary_module.ON_HELD_OUT]
    assert trained(recipe_tree(tmp_path / "plain", steps=1, held_out=held_out)).notices == []


def test_a_block_that_the_model_has_not_is_refused_before_anything_is_prepared(
    recipe_tree: Tree, tmp_path: Path
) -> None:
    changes = {**ADVERSARIAL, "distil": {"steps": 4, "adversarial": {"blocks": [1, 3]}}}
    with pytest.raises(RecipeError, match=r"no block 3.*0 to 2"):
        fit(Recipe.model_validate(recipe_tree(tmp_path / "run", **changes)))
    assert not (tmp_path / "cache").exists()


def test_recipes_without_an_adversary_are_the_bytes_that_they_were() -> None:
    """Of versions that knew no adversary."""
    recipe = load_recipe(None, _overrides("distil={guidance: 3, steps: 4}"))
    assert recipe.resolved()["distil"] == {"guidance": 3.0, "steps": 4, "substeps": 2}
    assert recipe.fingerprint() == "4604a95e3aca6619790897394a133839a730136f54e108380178a80c499f0314"
    with_one = load_recipe(None, _overrides())
    assert Recipe.model_validate(with_one.resolved()) == with_one
    assert with_one.fingerprint() != load_recipe(None, _overrides("distil={steps: 4}")).fingerprint()


def test_each_pass_has_noise_and_levels_of_its_own_and_weights_of_its_step(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[Any, Any, torch.Tensor]] = []
    own = Adversary.learn

    def watched(adversary: Adversary, on: Any, adapter: Any, batch: Any, again: Any, weights: Any, **how: Any) -> Any:
        passes.append((batch, again, weights))
        return own(adversary, on, adapter, batch, again, weights, **how)

    monkeypatch.setattr(Adversary, "learn", watched)
    tree = recipe_tree(tmp_path / "run", **ADVERSARIAL, steps=3, accumulate=2)
    recorder, _ = recorded_fit(tree)
    assert [len(info.sample_ids) for info in recorder.steps] == [4, 1, 3]
    assert [len(batch) for batch, _, _ in passes] == [2, 2, 1, 1, 2]
    by_step = [passes[:2], passes[2:3], passes[3:]]
    spec, seed = AdversarialSpec(**ADVERSARIAL["distil"]["adversarial"]), Recipe.model_validate(tree).seed
    for step, (info, found) in enumerate(zip(recorder.steps, by_step, strict=True)):
        levels = [level for _, again, _ in found for level in again.sigma.tolist()]
        slots = [sigma for batch, _, _ in found for sigma in batch.sigma.tolist()]
        assert slots == list(info.sigmas)
        assert levels == renoise_sigmas(spec, len(slots), seed, step).tolist()
        assert sum(float(weights.sum()) for _, _, weights in found) == pytest.approx(1)
    assert all(torch.equal(batch.latents, again.latents) and batch.text is again.text for batch, again, _ in passes)
    drawn = [noise for batch, again, _ in passes for both in (batch.noise, again.noise) for noise in both]
    assert len(drawn) == len({noise.numpy().tobytes() for noise in drawn}) == 16


# ---- what it takes ------------------------------------------------------------------------------------------------


def test_the_estimate_counts_heads_and_the_teachers_passes(recipe_tree: Tree, tmp_path: Path) -> None:
    def found(**distil: Any) -> Any:
        changes = {"objective": "distil", "distil": {"guidance": 1.0, "steps": 4, **distil}, "samples": {"every": 0}}
        return estimate_recipe(Recipe.model_validate(recipe_tree(tmp_path, **changes)), text_tokens=12)

    plain, with_heads = found(), found(adversarial={"width": 8, "blocks": [0, 2]})
    adversary = Adversary(AdversarialSpec(width=8, blocks=(0, 2)), based("fp32"), 0, "cpu")
    count = sum(parameter.numel() for parameter in adversary.parameters)
    assert with_heads.heads == 16 * count
    assert (plain.heads, with_heads.held - plain.held) == (0, 16 * count)
    assert with_heads.checkpoint - plain.checkpoint == 12 * count
    assert (
        with_heads.activations > 1.4 * plain.activations
    )  # the teacher's graph on top, but for its layers' own gradients
    assert "heads of the adversary" in with_heads.table()
    assert "adversary" not in plain.table()


def test_the_trace_of_a_pass_is_the_real_one() -> None:
    real, meta, spec = based("fp32"), based("fp32"), AdversarialSpec(width=8)
    adapter, adversary = adapted(real), Adversary(spec, real, 0, "cpu")
    with trace.attention_in_tiles(), LiveBytes() as live:
        adversary.learn(real, adapter, *pictures(), torch.ones(2))
    adapted(meta)
    meta.to("meta")
    learn = estimate._learning(meta, Adversary(spec, meta, 0, "meta"), None)
    traced = trace.trace_pass(meta, 2, (4, 6), 5, learn=learn)
    assert abs(traced - live.peak) < 0.1 * live.peak


# ---- several processes --------------------------------------------------------------------------------------------


def fitted_in_a_process(rank: int, port: int, tree: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fit(Recipe.model_validate(tree))


def test_two_processes_are_one_with_twice_the_passes(recipe_tree: Tree, tmp_path: Path) -> None:
    common = {**ADVERSARIAL, "steps": 3, "ema": [], "device": "cpu", "save": {"every": 3}}
    one, two = (recipe_tree(tmp_path / name, **common, accumulate=n) for name, n in (("one", 2), ("two", 1)))
    fit(Recipe.model_validate(one))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        list(
            pool.map(fitted_in_a_process, (0, 1), [port] * 2, [two] * 2)
        )  # with equal replicas: they are compared when saved
    for name in ("adapter", "heads"):
        folders = [checkpoint.step_folder(tmp_path / run, 3) for run in ("one", "two")]
        alone, both = (load_file(folder / f"{name}.safetensors") for folder in folders)
        for key, tensor in alone.items():
            torch.testing.assert_close(both[key], tensor, rtol=1e-3, atol=1e-4)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for told in ("loss", "gradient_norm", "discriminator_loss", "heads_gradient_norm"):
            assert a[told] == pytest.approx(b[told], rel=1e-4, abs=1e-6)

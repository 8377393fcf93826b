"""A training adapter: on and frozen while another adapter is trained, no part of the result."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.export import export_adapter
from libreflux.adapter.io import load_adapter, save_adapter
from libreflux.adapter.layers import AdaptedLinear, linear_shapes
from libreflux.adapter.merge import merge
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import LibrefluxError
from libreflux.model.facts import read_facts
from libreflux.model.int8 import dequantise_model, quantise_model
from libreflux.model.opening import open_model
from libreflux.model.text import TextConditioning
from libreflux.recipe import Recipe
from libreflux.training import training_adapter
from libreflux.training.callbacks import Callbacks
from libreflux.training.estimate import estimate_recipe
from libreflux.training.loop import fit
from libreflux.training.objective import NoisedBatch, flow_matching_loss, regularised_target
from libreflux.training.training_adapter import TrainingAdapter, together
from tiny import change_json, make_tiny_model, tiny_transformer
from training.recorded import Recorder

Tree = Callable[..., dict[str, Any]]
LORA = {"kind": "lora", "rank": 2}
OTHERS: dict[str, Any] = {"guided_target": {"scale": 3, "decay": 1}, "hold_base": {"weight": 0.2}}


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def made(recipe_tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training adapter of the tiny model, and beside it the cache of its run."""
    out = tmp_path_factory.mktemp("made") / "run"
    adapter = {**LORA, "role": "training_adapter"}
    tree = recipe_tree(out, adapter=adapter, steps=2, optimizer={"kind": "adamw", "learning_rate": 5e-2}, ema=[])
    return fit(Recipe.model_validate(tree))


@pytest.fixture
def with_it(recipe_tree: Tree, made: Path, tmp_path: Path) -> Tree:
    """A recipe that trains a LoKr with it; keywords as of `recipe_tree`, those of `adapter` are added."""

    def tree(name: str, *, adapter: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        own = {"targets": [{"layers": "**", "factor": 4}], "training_adapter": str(made), **(adapter or {})}
        changes = {"steps": 2, "ema": [], "cache": str(made.parents[1] / "cache"), **changes}
        return recipe_tree(tmp_path / name, adapter=own, **changes)

    return tree


# ---- what it does to the gradient -----------------------------------------------------------------------------------


def _batch() -> NoisedBatch:
    generator = torch.Generator().manual_seed(5)
    latents, noise = torch.randn(2, 4, 16, 4, 6, generator=generator)
    tokens = [torch.randn(length, 24, generator=generator) for length in (3, 7, 7, 1)]
    pooled = torch.randn(4, 16, generator=generator)
    return NoisedBatch(latents, noise, torch.linspace(0.1, 0.9, 4), TextConditioning(tokens, pooled))


def _trained(transformer: FluxTransformer2DModel) -> Adapter:
    rows = resolve(linear_shapes(transformer), [Target(layers="**", factor=4)])
    return attach(transformer, rows, init="perturbed", scale=0.1)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> TrainingAdapter:
    """A LoRA of random numbers for the tiny transformer, at weight 0.5."""
    transformer = tiny_transformer()
    adapter = attach(transformer, resolve(linear_shapes(transformer), [Target(layers="**", rank=2)]))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("beside") / "a.safetensors"
    save_adapter(adapter, path)
    return TrainingAdapter(load_adapter(path), 0.5)


@pytest.mark.parametrize(("int8", "checkpointing"), [(False, False), (False, True), (True, True)])
def test_the_gradient_is_that_of_a_model_with_it_merged(
    beside: TrainingAdapter, int8: bool, checkpointing: bool
) -> None:
    model = tiny_transformer()
    if int8:
        quantise_model(model)
    separate = copy.deepcopy(model)
    dequantise_model(separate, torch.float32)
    merge(separate, beside.file, 0.5)
    adapter, reference = _trained(model), _trained(separate)
    reference.load_state_dict(adapter.state_dict())
    on = beside.put_on(model, adapter, "cpu")
    if checkpointing:
        model.enable_gradient_checkpointing()
    gradients = [
        torch.autograd.grad(flow_matching_loss(each, _batch()).sum(), list(own.parameters()))
        for each, own in ((model, adapter), (separate, reference))
    ]
    size = max(float(one.abs().max()) for one in gradients[1])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * size)
    assert not any(parameter.requires_grad for parameter in on.parameters())
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_with_both_off_the_base_is_left_and_with_one_off_the_other(beside: TrainingAdapter) -> None:
    model, batch = tiny_transformer(), _batch()
    with torch.no_grad():
        base = flow_matching_loss(model, batch)
        adapter = _trained(model)
        alone = flow_matching_loss(model, batch)
        on = beside.put_on(model, adapter, "cpu")
        both = flow_matching_loss(model, batch)
        with together(adapter, on).disabled():
            assert torch.equal(flow_matching_loss(model, batch), base)
        with on.disabled():
            assert torch.equal(flow_matching_loss(model, batch), alone)
        assert not torch.equal(both, alone)


def test_regularised_pictures_keep_what_the_result_draws(beside: TrainingAdapter) -> None:
    """An adapter without effect has no loss on them, whatever the training adapter does; the others are as before."""
    model, batch, regularised = tiny_transformer(), _batch(), (True, False, True, False)
    adapter = attach(model, resolve(linear_shapes(model), [Target(layers="**", rank=2)]))
    on = beside.put_on(model, adapter, "cpu")
    target = regularised_target(model, together(adapter, on), batch, regularised)
    losses = training_adapter.losses(model, on, batch, regularised, target)
    plain = flow_matching_loss(model, batch)
    assert losses[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(losses[[1, 3]], plain[[1, 3]])
    assert torch.equal(training_adapter.losses(model, on, batch, (False,) * 4, batch.target), plain)


# ---- in a run -------------------------------------------------------------------------------------------------------


def test_one_is_made_with_its_role_its_base_and_its_recipe(made: Path, tiny_model_dir: Path) -> None:
    told = _metadata(made)
    assert told["role"] == "training_adapter"
    assert told["model_hash"] == open_model(str(tiny_model_dir)).hash
    assert json.loads(told["recipe_keys"])["adapter"]["rank"] == 2


def test_at_weight_0_a_run_equals_one_without(with_it: Tree, made: Path) -> None:
    plain = fit(Recipe.model_validate(with_it("plain", adapter={"training_adapter": None}, base="bf16")))
    at_0 = fit(Recipe.model_validate(with_it("zero", adapter={"training_adapter": f"{made}:0"}, base="bf16")))
    at_1 = fit(Recipe.model_validate(with_it("one", base="bf16")))
    expected, found, other = (load_file(path) for path in (plain, at_0, at_1))
    assert sorted(found) == sorted(other) == sorted(expected)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in expected.items())
    assert "training_adapter" not in _metadata(plain)
    told = {key: value for key, value in _metadata(at_1).items() if key.startswith("training_adapter")}
    sha256 = load_adapter(made).sha256
    assert told == {
        "training_adapter": made.name,
        "training_adapter_sha256": sha256,
        "training_adapter_weight": "1",
    }
    assert (_metadata(at_1)["sampling_steps"], _metadata(plain)["sampling_steps"]) == ("4", "4")


class _Seen(Recorder):
    """Whether the training adapter is on while pictures are drawn or measured."""

    def __init__(self, made: Path) -> None:
        super().__init__()
        self.made, self.on = str(made), set[tuple[str, bool]]()

    def look(self, event: str, transformer: FluxTransformer2DModel) -> None:
        layers = [one for one in transformer.modules() if isinstance(one, AdaptedLinear) and one.origin == self.made]
        assert layers
        self.on |= {(event, layer.enabled) for layer in layers}

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        self.look("sample", transformer)

    def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: object) -> None:
        self.look("measure", transformer)


@pytest.mark.parametrize("shown", [False, True])
def test_samples_and_measures_are_without_it(with_it: Tree, made: Path, share: float, shown: bool) -> None:
    samples = {"every": 1, "prompts": ["a fox"], "with_training_adapter": shown}
    recipe = Recipe.model_validate(
        with_it("seen", steps=1, samples=samples, held_out={"share": share, "every": 1, "sigmas": [0.5]})
    )
    assert recipe.samples.guidance == ((3.0,) if shown else (1.0,))
    seen = _Seen(made)
    fit(recipe, seen)
    assert seen.on == {("measure", False), ("sample", shown)}


def test_the_result_draws_in_the_few_steps_of_its_base(made: Path, with_it: Tree, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "student")
    change_json(folder / "libreflux.json", steps=4, guidance=1.0)
    facts = read_facts(folder)
    recipe = Recipe.model_validate(with_it("run", samples={"prompts": ["a fox"], "with_training_adapter": True}))
    found = [
        (one.steps, one.guidance)
        for one in (training_adapter.result_facts(facts, recipe), training_adapter.sample_facts(facts, recipe))
    ]
    assert found == [(4, 1.0), (28, 3.5)]
    for keys, drawn in (
        ({"guided_target": {"scale": 3}}, (4, 1.0)),
        ({"guided_target": {"scale": 1}}, (28, 3.5)),
        ({"hold_base": {"weight": 0.2}}, (28, 3.5)),
    ):
        without = Recipe.model_validate(with_it("other", adapter={"training_adapter": None}, **keys))
        one = training_adapter.result_facts(facts, without)
        assert (one.steps, one.guidance) == drawn


def test_a_killed_run_ends_with_the_same_bytes(
    with_it: Tree, fork_runs: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    """With the other keys that keep few steps: each turns adapters on and off in its own way."""
    samples = {"every": 1, "at_start": True, "prompts": ["a fox"]}
    changes: dict[str, Any] = {"steps": 4, "gradient_checkpointing": True, "samples": samples, **OTHERS}
    whole, held = (with_it(name, **changes) for name in ("whole", "held"))
    moments = [{"backward": 3}, {"event": "os.rename", "match": r"checkpoints/step-00000004$", "nth": 1}, None]
    results = fork_runs([{"recipe": whole, "moment": None}, *({"recipe": held, "moment": one} for one in moments)])
    assert [result["code"] for result in results] == [0, -9, -9, 0]
    expected, found = (
        {str(path.relative_to(tree["out"])): path.read_bytes() for path in Path(tree["out"]).rglob("*.safetensors")}
        for tree in (whole, held)
    )
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_the_result_loads_in_diffusers_by_its_names_and_by_comfyuis(with_it: Tree, tmp_path: Path) -> None:
    adapter = {**LORA, "targets": [{"layers": "**.attn.**"}]}
    optimizer = {"kind": "adamw", "learning_rate": 5e-2}
    trained = load_adapter(fit(Recipe.model_validate(with_it("run", adapter=adapter, optimizer=optimizer, **OTHERS))))
    plain, merged = tiny_transformer(), tiny_transformer()
    merge(merged, trained)
    for program in ("diffusers", "comfyui"):
        export_adapter(trained, program, tmp_path / f"{program}.safetensors")
        theirs = tiny_transformer()
        pipe = FluxPipeline(None, None, None, None, None, None, theirs)
        pipe.load_lora_weights(tmp_path, weight_name=f"{program}.safetensors")
        pipe.fuse_lora()
        for name in trained.layer_names().values():
            ours, before = (one.get_submodule(name).weight for one in (merged, plain))
            assert not torch.equal(ours, before)
            torch.testing.assert_close(theirs.get_submodule(name).base_layer.weight, ours, rtol=1e-4, atol=1e-6)


def test_memory_counts_it_by_name(with_it: Tree) -> None:
    recipe = Recipe.model_validate(with_it("run", base="int8"))
    without = Recipe.model_validate(with_it("run", adapter={"training_adapter": None}, base="int8"))
    found, plain = (estimate_recipe(one, text_tokens=16) for one in (recipe, without))
    size = sum(each.numel() for each in load_file(recipe.adapter.training_adapter or "").values() if each.ndim)
    assert found.training_adapter == 2 * size  # in bf16, as the base
    assert (found.weights, found.adapter, found.moments) == (plain.weights, plain.adapter, plain.moments)
    assert found.held == plain.held + 2 * size
    assert "training adapter, frozen" in found.table()
    assert "training adapter" not in plain.table()


# ---- what is refused ------------------------------------------------------------------------------------------------


class _NoWork(Callbacks):
    def on_prepare(self, done: int, total: int, note: str = "") -> None:
        raise AssertionError("work began before the refusal")


def _refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(LibrefluxError) as refused:
        fit(Recipe.model_validate(tree), _NoWork())
    return str(refused.value)


def _changed(made: Path, out: Path, drop: str = "", **metadata: str) -> Path:
    """Its file with other metadata, and layers renamed that end so."""
    tensors = {name.replace(drop, "no_layer") if drop else name: tensor for name, tensor in load_file(made).items()}
    save_file(tensors, out, {**_metadata(made), **metadata})
    return out


def test_a_file_that_does_not_go_with_the_run_is_refused_before_it_begins(
    with_it: Tree, made: Path, tmp_path: Path
) -> None:
    for changes, told in (
        ({"model_hash": "0" * 64, "model": "another"}, "was made for other weights (0000000000, another)"),
        ({"text_padding": "trim"}, "was made with text padding trim, and this recipe has drop"),
        ({"drop": "proj_out"}, "fit no linear layer"),
    ):
        file = _changed(made, tmp_path / "changed.safetensors", **changes)
        assert told in _refusal(with_it("run", adapter={"training_adapter": str(file)}))
    assert "no such training adapter" in _refusal(with_it("run", adapter={"training_adapter": str(tmp_path / "none")}))


def test_one_goes_with_a_base_that_was_quantised_from_its_own(made: Path) -> None:
    one, own = TrainingAdapter(load_adapter(made), 1.0), _metadata(made)["model_hash"]
    one.check_base("in int8", "1" * 64, {"quantised": {"sha256": own}})
    with pytest.raises(LibrefluxError, match="was made for other weights"):
        one.check_base("merged", "1" * 64, {"base_sha256": own, "adapters": [{"sha256": "2" * 64}]})


def test_a_run_goes_on_with_the_file_that_it_began_with(with_it: Tree, made: Path, tmp_path: Path) -> None:
    file, elsewhere = tmp_path / "own.safetensors", tmp_path / "moved.safetensors"
    shutil.copyfile(made, file)
    fit(Recipe.model_validate(with_it("run", adapter={"training_adapter": str(file)})))
    longer = with_it("run", adapter={"training_adapter": str(file)}, steps=3)
    bytes_before = file.read_bytes()
    _changed(made, file, note="another")
    assert "the training adapter has changed since this run began" in _refusal(longer)
    file.unlink()
    assert "no such training adapter" in _refusal(longer)
    other_weight = with_it("run", adapter={"training_adapter": f"{elsewhere}:0.5"}, steps=3)
    assert "adapter.training_adapter ('at weight 1' -> 'at weight 0.5')" in _refusal(other_weight)
    assert "adapter.training_adapter ('at weight 1' -> none)" in _refusal(
        with_it("run", adapter={"training_adapter": None}, steps=3)
    )
    elsewhere.write_bytes(bytes_before)
    fit(Recipe.model_validate(with_it("run", adapter={"training_adapter": str(elsewhere)}, steps=3)))


def test_a_run_folder_stands_for_its_result_and_a_foreign_file_is_told_of(
    with_it: Tree, made: Path, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(with_it("run", adapter={"training_adapter": f"{made.parent}:0.5"}))
    found = training_adapter.read(recipe)
    assert found is not None
    assert (Path(found.file.where), found.weight) == (made, 0.5)
    assert found.lines() == [f"training adapter: {made} at weight 0.5, frozen, no part of the result"]
    save_file(load_file(made), tmp_path / "foreign.safetensors")
    foreign = training_adapter.read(
        Recipe.model_validate(with_it("run", adapter={"training_adapter": str(tmp_path / "foreign.safetensors")}))
    )
    assert foreign is not None
    assert "does not say which model it was made for" in foreign.lines()[1]

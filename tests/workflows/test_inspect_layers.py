"""`libreflux inspect layers`: the whole way, from a model and pictures to a page and a recipe that trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import libreflux
from libreflux.adapter.adapter import attach
from libreflux.adapter.io import save_adapter
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import LibrefluxError, ModelError, OptionError, RunError
from libreflux.workflows.inspect_layers_options import InspectLayersOptions, check_options, parameters_of
from tiny import change_json, make_tiny_model, tiny_transformer

QUICK: dict[str, Any] = {"pictures": 2, "sigmas": [0.5], "resolution": 32}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoKr on the AdaLN layers of the single blocks alone, the second one ten times as strong."""
    transformer = tiny_transformer()
    shapes = linear_shapes(transformer)
    made = attach(transformer, resolve(shapes, [Target(layers="single_transformer_blocks.*.norm.linear", factor=4)]))
    for number, layer in enumerate(made.layers.values()):
        torch.nn.init.constant_(layer.delta.lokr_w2, 0.01 * 10**number)  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("adapter") / "norms.safetensors"
    save_adapter(made, path)
    return path


def test_a_budget_is_a_section_that_trains_with_so_many_parameters(
    run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "layers"
    done = run(
        *("inspect", "layers", tiny_model_dir, "--data", pictures, "--pictures", 2, "--sigmas", "0.3,0.8"),
        *("--resolution", 32, "--budget", "12k", "--out", out),
    )
    assert done.code == 0, done.err
    told = json.loads((out / "layers.json").read_text())
    assert (told["schema"], told["measure"], told["budget"], told["pictures"]) == (1, "distance", 12_000, 2)
    assert told["headline"] in done.out
    assert told["headline"].replace("'", "&#x27;") in (out / "index.html").read_text()
    parameters = sum(row["parameters"] for row in told["adapter"])
    assert abs(parameters - 12_000) <= 240
    assert f"an adapter section of {parameters:,} parameters" in done.out
    section = yaml.safe_load((out / "adapter.yaml").read_text())
    tree = {"model": str(tiny_model_dir), "data": [{"path": str(pictures)}], "resolution": 32, "steps": 1}
    made = libreflux.train(tree | section | {"out": str(tmp_path / "run"), "batch": 1})
    tensors = load_file(tmp_path / "run" / "adapter.safetensors")
    assert sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".alpha")) == parameters
    assert made is not None
    again = run("inspect", "layers", tiny_model_dir, "--data", pictures, "--out", out, "--json", "--pictures", 2)
    assert again.code == 0, again.err
    assert json.loads(again.out)["schema"] == 1
    assert not (out / "adapter.yaml").exists()


def test_what_an_adapter_changed_is_shown_and_gets_the_budget(
    tiny_model_dir: Path, pictures: Path, adapter: Path, tmp_path: Path
) -> None:
    found = libreflux.inspect_layers(
        str(tiny_model_dir), against=str(adapter), data=pictures, budget=1544, out=tmp_path / "out", **QUICK
    )
    changed = {one.layer: one.relative for one in found.changes if one.change}
    first, second = (f"single_transformer_blocks.{number}.norm.linear" for number in range(2))
    assert set(changed) == {first, second}
    assert changed[second] == pytest.approx(10 * changed[first], rel=0.2)
    assert {row.name for row in found.layers} <= {first, second}
    assert found.parameters == 1544
    assert "What changed most, for its size, are the layers of AdaLN" in found.headline
    assert "What changed to" in found.page.read_text()
    rows = json.loads(found.file.read_text())["changes"]
    assert [row["name"] for row in rows] == list(tiny_transformer().state_dict())


def test_an_adapter_on_the_model_is_measured_with_it(
    tiny_model_dir: Path, pictures: Path, adapter: Path, tmp_path: Path
) -> None:
    plain = libreflux.inspect_layers(str(tiny_model_dir), data=pictures, out=tmp_path / "a", **QUICK)
    adapted = libreflux.inspect_layers(
        str(tiny_model_dir), adapters=f"{adapter}:5", data=pictures, out=tmp_path / "b", **QUICK
    )
    same = plain.table.distance("image") == adapted.table.distance("image")
    assert same.tolist() == [True, False, False]  # it is on the single blocks alone
    assert plain.targets is None
    assert not (tmp_path / "a" / "adapter.yaml").exists()


def test_a_model_that_reads_padding_is_measured_as_it_would_be_trained(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model(tmp_path / "keep")
    change_json(model / "libreflux.json", text_padding="keep")
    libreflux.inspect_layers(str(model), data=pictures, out=tmp_path / "out", **(QUICK | {"pictures": 1}))
    assert "reads padded text (keep): its layers are measured without" in caplog.text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("600M", 600_000_000),
        ("3.2b", 3_200_000_000),
        ("40k", 40_000),
        (1234, 1234),
        ("1e6", 10**6),
        ("1,234,567", 1_234_567),
        ("600_000k", 600_000_000),
        (6e8, 600_000_000),
    ],
)
def test_a_number_of_parameters(text: str | int, number: int) -> None:
    assert parameters_of(text) == number


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": "many"}, "'many' is no number of parameters"),
        ({"budget": "3,2B"}, "'3,2B' is no number of parameters"),
        ({"budget": "1.2.3M"}, "'1.2.3M' is no number of parameters"),
        ({"budget": 0}, "0 is no number of parameters"),
        ({"measure": "gradient"}, "has no effect without `budget`"),
        ({"measure": "change", "budget": "1M"}, "change needs a second model"),
        ({"measure": "size", "budget": "1M"}, "no measure 'size'"),
        ({"sigmas": [0.5, 1.0]}, "cannot be 1.0"),
        ({"sigmas": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, "one to five"),
        ({"pictures": 0}, "cannot be 0"),
        ({"resolution": 40}, "40 is not a multiple of 16"),
        ({"dtype": "int4"}, "cannot be 'int4'"),
        ({"quantize": "w8a8"}, "cannot be 'w8a8'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options: dict, told: str) -> None:
    with pytest.raises(OptionError) as error:
        check_options(InspectLayersOptions("nowhere", **options))
    assert told in str(error.value)


def test_other_folders_models_and_budgets_are_refused_in_one_line(
    tiny_model_dir: Path, pictures: Path, adapter: Path, tmp_path: Path
) -> None:
    def refused(kind: type[LibrefluxError], told: str, model: Path, **options: Any) -> None:
        with pytest.raises(kind, match=told) as error:
            libreflux.inspect_layers(str(model), **{**QUICK, "out": tmp_path / "out", **options})
        assert "\n" not in str(error.value)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    refused(RunError, "holds something else", tiny_model_dir, data=pictures, out=tmp_path / "mine")
    (tmp_path / "mine" / "cache").mkdir()
    refused(RunError, "holds something else", tiny_model_dir, data=pictures, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "index.html").read_text() == "mine"
    refused(OptionError, "is an adapter", adapter, data=pictures)
    refused(OptionError, "not of the emoji family", tiny_model_dir)
    refused(OptionError, "more than the", tiny_model_dir, data=pictures, budget="1B")
    refused(OptionError, "fewer than the smallest", tiny_model_dir, data=pictures, budget=3)
    blocks = sum(inner * outer + 1 for name, inner, outer in linear_shapes(tiny_transformer()) if "blocks." in name)
    too_many = {"data": pictures, "budget": round(1.03 * blocks)}
    refused(OptionError, f"more than the {blocks:,}", tiny_model_dir, measure="centred", **too_many)
    refused(OptionError, "more than the", tiny_model_dir, data=pictures, against=str(adapter), budget=blocks)
    same = {"data": pictures, "against": str(tiny_model_dir), "budget": 9000}
    refused(OptionError, "no layer has any change", tiny_model_dir, **same)
    assert not (tmp_path / "out").exists(), "the work came first"
    other = make_tiny_model(tmp_path / "other")
    change_json(other / "transformer" / "config.json", num_single_layers=3)
    refused(ModelError, "single_transformer_blocks.2", tiny_model_dir, data=pictures, against=str(other))
    assert not (tmp_path / "out").exists()

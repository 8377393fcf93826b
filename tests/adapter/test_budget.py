"""A budget spent on layers: within 2 %, in the shares of the measure, by patterns that choose just that."""

from __future__ import annotations

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel

from libreflux.adapter.budget import TOLERANCE, as_targets, as_yaml, spend
from libreflux.adapter.factors import lokr_shapes
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import resolve
from libreflux.errors import OptionError
from libreflux.recipe import AdapterSpec


@pytest.fixture(scope="module")
def flux() -> list[tuple[str, int, int]]:
    """The linears of FLUX.1, of 19 and 38 blocks."""
    with torch.device("meta"):
        small = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    shapes = linear_shapes(small)
    found = []
    for name, inner, outer in shapes:
        kind, _, rest = name.partition(".")
        count = {"transformer_blocks": 19, "single_transformer_blocks": 38}.get(kind)
        if count is None:
            found.append((name, inner, outer))
        else:
            found += [(f"{kind}.{block}.{rest.partition('.')[2]}", inner, outer) for block in range(count)]
    assert len(found) == 502
    return found


def uneven(shapes: list[tuple[str, int, int]], seed: int) -> dict[str, float]:
    """Shares over five orders of magnitude."""
    powers = 5 * torch.rand(len(shapes), generator=torch.Generator().manual_seed(seed))
    return {name: float(10**power) for (name, _, _), power in zip(shapes, powers, strict=True)}


@pytest.mark.parametrize("budget", [2_000_000, 40_000_000, 600_000_000, 3_200_000_000, 11_000_000_000])
def test_a_budget_is_met_within_two_percent(flux: list[tuple[str, int, int]], budget: int) -> None:
    spent = spend(flux, uneven(flux, 1), budget)
    rows = resolve(flux, as_targets(spent.factors))
    assert abs(spent.parameters - budget) <= TOLERANCE * budget
    assert sum(row.parameters for row in rows) == spent.parameters
    assert {row.name: row.factor for row in rows} == spent.factors


def test_layers_get_what_they_have_of_the_measure(flux: list[tuple[str, int, int]]) -> None:
    """To one step between sizes, about a factor of two either way, but for what is full."""
    shares = {name: 1.0 if ".attn." in name else 100.0 for name, _, _ in flux if name.startswith("single_")}
    spent = spend(flux, shares, 600_000_000)
    assert {name.partition(".")[0] for name in spent.factors} == {"single_transformer_blocks"}
    sizes = {
        name: sum(a * b for a, b in lokr_shapes(i, o, spent.factors[name])) for name, i, o in flux if name in shares
    }
    kinds = {
        part: [sizes[name] for name in sizes if name.endswith(part)] for part in ("norm.linear", "proj_mlp", "to_q")
    }
    assert 0.4 < sum(kinds["norm.linear"]) / sum(kinds["proj_mlp"]) < 2.5
    assert 40 < sum(kinds["norm.linear"]) / sum(kinds["to_q"]) < 250


def test_a_full_layer_gives_the_rest_to_others() -> None:
    shapes = [("a", 64, 64), ("b", 64, 64), ("c", 64, 64)]
    spent = spend(shapes, {"a": 1e6, "b": 1.0, "c": 1.0}, 64 * 64 + 2 * 1028)
    assert spent.factors["a"] == 1
    assert spent.factors["b"] == spent.factors["c"] == 2


def test_what_has_nothing_of_the_measure_gets_nothing() -> None:
    spent = spend([("a", 64, 64), ("b", 64, 64)], {"a": 1.0, "b": 0.0}, 4097)
    assert spent.factors == {"a": 1}


@pytest.mark.parametrize(
    ("budget", "told"),
    [(20_000, "more than the 8,194"), (10, "fewer than the smallest LoKr"), (2500, "no factors come within 2%")],
)
def test_a_budget_that_cannot_be_met_is_refused(budget: int, told: str) -> None:
    shapes = [("a", 64, 64), ("b", 64, 64)]
    with pytest.raises(OptionError, match=told) as error:
        spend(shapes, {"a": 1.0, "b": 1.0}, budget)
    assert "; hint: use " in str(error.value)


def test_the_section_is_read_by_recipes(flux: list[tuple[str, int, int]]) -> None:
    spent = spend(flux, uneven(flux, 2), 600_000_000)
    tree = yaml.safe_load(as_yaml(as_targets(spent.factors), ["of a test", "two lines"]))
    spec = AdapterSpec.model_validate(tree["adapter"])
    assert [(one.layers, one.factor) for one in spec.targets or ()] == [
        (one.layers, one.factor) for one in as_targets(spent.factors)
    ]

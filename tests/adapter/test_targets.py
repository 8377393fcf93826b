"""The pattern grammar against a plain matcher, what is refused, and parameter counts of the real FLUX.1."""

from __future__ import annotations

import fnmatch
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import example, given
from hypothesis import strategies as st

from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, compile_pattern, resolve, table
from libreflux.errors import AdapterError

Shapes = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def flux() -> Shapes:
    """Linears of FLUX.1-schnell at full size, without memory."""
    with torch.device("meta"):
        return linear_shapes(FluxTransformer2DModel(guidance_embeds=False))


def all_of(factor: int, layers: str = "**") -> list[Target]:
    return [Target(layers=layers, factor=factor)]


def naive(parts: list[str], names: list[str]) -> bool:
    """The grammar written down: whole-name match, part by part."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(naive(parts[1:], names[skip:]) for skip in range(len(names) + 1))
    if not names:
        return False
    brace = re.fullmatch(r"\{(\d+)-(\d+)\}", parts[0])
    if brace:
        fits = names[0].isdigit() and int(brace[1]) <= int(names[0]) <= int(brace[2])
    else:
        fits = parts[0] in ("*", names[0])
    return fits and naive(parts[1:], names[1:])


PARTS = st.sampled_from(["a", "bc", "*", "**", "{0-2}", "{8-11}", "1", "10"])
NAMES = st.lists(st.sampled_from(["a", "bc", "0", "1", "2", "8", "10", "abc"]), min_size=1, max_size=5)


@given(st.lists(PARTS, min_size=1, max_size=4), NAMES)
@example(["a", "**", "**"], ["a"])
@example(["**", "**", "a"], ["a"])
def test_patterns_match_as_the_grammar_says(parts: list[str], names: list[str]) -> None:
    regex, _ = compile_pattern(".".join(parts))
    assert bool(regex.fullmatch(".".join(names))) == naive(parts, names)


def test_part_patterns_and_number_lists() -> None:
    regex, braces = compile_pattern("blocks.{1,3,8-10}.to_*")
    assert braces == [[1, 3, 8, 9, 10]]
    assert regex.fullmatch("blocks.10.to_q")
    for name in ("blocks.1.to_out.0", "blocks.2.to_q", "blocks.11.to_q", "xblocks.1.to_q", "blocks.1.to_q.x"):
        assert not regex.fullmatch(name)


@pytest.mark.parametrize("pattern", ["a.[8-15]*", "a..b", "", ".a", "a.**b", "a.{x}", "a.{7-0}", "a.{}", "a.{1", "a?"])
def test_broken_patterns(pattern: str) -> None:
    with pytest.raises(AdapterError, match="hint"):
        compile_pattern(pattern)


# Millions of parameters, full-matrix LoKr on every Linear, counted with lycoris-lora.
@pytest.mark.parametrize(
    ("factor", "millions"), [(1, 11_888), (2, 2_972), (3, 1_322), (4, 743), (5, 721), (8, 186), (16, 46.6)]
)
def test_parameter_counts_of_flux(flux: Shapes, factor: int, millions: float) -> None:
    rows = resolve(flux, all_of(factor))
    assert len(rows) == len(flux) == 502
    assert sum(row.parameters for row in rows) / 1e6 == pytest.approx(millions, abs=0.8 if factor < 16 else 0.05)


def test_published_600_million_recipes(flux: Shapes) -> None:
    """Attention and feed-forward at factor 3: 597.7 M; per-block factors with their ranges as intended: 580.4 M."""
    even = resolve(flux, [Target(layers=f"**.{part}.**", factor=3) for part in ("attn", "ff", "ff_context")])
    assert sum(row.parameters for row in even) / 1e6 == pytest.approx(597.7, abs=0.1)
    double = {"{0-7}": 4, "{8-15}": 5, "{16-18}": 10}
    single = {"{0-15}": 8, "{16-23}": 5, "{24-37}": 4}
    targets = [Target(layers=f"transformer_blocks.{blocks}.**", factor=factor) for blocks, factor in double.items()]
    targets += [Target(layers=f"single_transformer_blocks.{k}.**", factor=factor) for k, factor in single.items()]
    assert sum(row.parameters for row in resolve(flux, targets)) / 1e6 == pytest.approx(580.4, abs=0.1)


def test_first_match_wins_in_the_models_order(flux: Shapes) -> None:
    rows = resolve(flux, [Target(layers="transformer_blocks.{3}.**", factor=2), *all_of(8)])
    assert [row.name for row in rows] == [name for name, _, _ in flux]
    assert {row.factor for row in rows if row.name.startswith("transformer_blocks.3.")} == {2}
    assert {row.factor for row in rows if not row.name.startswith("transformer_blocks.3.")} == {8}


def test_a_pattern_that_matches_nothing_names_near_ones(flux: Shapes) -> None:
    with pytest.raises(AdapterError) as caught:
        resolve(flux, all_of(4, "transformer_blocks.*.norm1"))
    assert "transformer_blocks.*.norm1'" in str(caught.value)
    assert "transformer_blocks.*.norm1.linear" in str(caught.value)


def original_exclude(names: list[str], patterns: list[str]) -> list[str]:
    """As published for the int8 base: what is left to quantise; a pattern that takes nothing away goes unnoticed."""
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def test_a_pattern_without_effect_is_refused_where_the_original_list_was_mostly_inert(flux: Shapes) -> None:
    names = [name for name, _, _ in flux]
    left = original_exclude(names, ["*.norm", "*.norm1", "norm_out", "proj_out", "x_embedder", "context_embedder"])
    adaln = {name for name in names if name.endswith((".norm.linear", ".norm1.linear", "norm_out.linear"))}
    assert len(adaln) == 38 + 19 + 1
    assert adaln <= {*left}
    assert len(left) == len(names) - 3  # every AdaLN was quantised
    for pattern in ("*.norm", "*.norm1", "norm_out", "**.norm", "**.norm1"):
        assert original_exclude(names, [pattern.replace("**", "*")]) == names
        with pytest.raises(AdapterError, match="matches no linear layer"):
            resolve(flux, all_of(4, pattern))


def test_numbers_that_the_model_does_not_have(flux: Shapes) -> None:
    with pytest.raises(AdapterError, match=r"\{19-20\}"):
        resolve(flux, all_of(4, "transformer_blocks.{0-20}.attn.**"))


def test_a_pattern_wholly_hidden(flux: Shapes) -> None:
    with pytest.raises(AdapterError, match=r"attn.*taken by earlier.*\*\*"):
        resolve(flux, [*all_of(4), *all_of(8, "**.attn.**")])


def test_no_targets(flux: Shapes) -> None:
    with pytest.raises(AdapterError, match="no targets"):
        resolve(flux, [])


def test_table_adds_up(flux: Shapes) -> None:
    rows = resolve(flux, [*all_of(4, "transformer_blocks.{0-3,5}.attn.to_q"), *all_of(8, "norm_out.linear")])
    lines = table(rows).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:3] == ["transformer_blocks.{0-3,5}.attn.to_q", "5", "4"]
    assert lines[2].split()[:3] == ["norm_out.linear", "1", "8"]
    counts = [int(line.split()[-1].replace(",", "")) for line in lines[1:]]
    assert counts[0] + counts[1] == counts[2] == sum(row.parameters for row in rows)
    assert len({len(line) for line in lines}) == 1

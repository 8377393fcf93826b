"""A recipe is read, or refused in one line that names key, value and hint: whatever is written, under every key.

Keys, types and ranges come from the schema of `Recipe`, so that a new key is fuzzed without a line here.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from libreflux.errors import RecipeError
from libreflux.recipe import Recipe, read_recipe, yaml_text

SCHEMA = Recipe.model_json_schema()
SHIPPED = {path.name: path.read_text() for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml")}
TREES = [yaml.safe_load(text) for text in SHIPPED.values()]
LEAST = {"data": [{"path": "photos"}], "resolution": 512, "steps": 10, "out": "runs/a"}
Key = tuple[str | int, ...]


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for, which pydantic 2.8 wraps in a list of one."""
    [schema] = schema.get("allOf", [schema])
    return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def schemas(schema: dict[str, Any], key: Key = ()) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Every key below a schema, the first item standing for a list's, with what may be there."""
    schema = resolved(schema)
    if key:
        yield key, schema
    for name, inside in schema.get("properties", {}).items():
        yield from schemas(inside, (*key, name))
    for part in [schema["items"]] if "items" in schema else schema.get("prefixItems", [])[:1]:
        yield from schemas(part, (*key, 0))
    for one in schema.get("anyOf", []):
        yield from (row for row in schemas(one, key) if row[0] != key)


KEYS = dict(schemas(SCHEMA))


def fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a JSON schema."""
    schema = resolved(schema)
    if "anyOf" in schema:
        return st.one_of([fitting(one) for one in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema["type"] == "integer":
        return st.integers(low or 0, high or 5000) | st.just(512)
    if schema["type"] == "number":
        low, high = (low if low is not None else schema.get("exclusiveMinimum", 0)), high or 1
        return st.floats(low, high, exclude_min="exclusiveMinimum" in schema)
    if schema["type"] == "array" and "prefixItems" in schema:
        return st.tuples(*map(fitting, schema["prefixItems"])).map(list)
    if schema["type"] == "array":
        return st.lists(fitting(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
    if schema["type"] == "object" and "properties" in schema:
        fields = {name: fitting(one) for name, one in schema["properties"].items()}
        needed = {name: fields.pop(name) for name in schema.get("required", [])}
        return st.fixed_dictionaries(needed, optional=fields)
    if schema["type"] == "object":
        return st.dictionaries(st.sampled_from(["short", "long"]), fitting(schema["additionalProperties"]))
    simple = {"boolean": st.booleans(), "null": st.none(), "string": st.text(min_size=schema.get("minLength", 0))}
    return simple[schema["type"]]


ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    2**31,
    2**63,
    -(2**70),
    10**400,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "~",
    "~no-such-user/x",
    "on",
    "1e-4",
    "0x10",
    "12",
    "1e999",
    "\N{SNOWMAN}\u2028\x85x",
    "\ud800",
    "\x1b[2J",
    "x" * 2_000,
    "\0",
    [],
    {},
    [[]],
    [None],
    [""],
    {"x": 1},
    {"": None},
    [{}],
    [1, 1],
    {"path": 1},
    b"\xff\x00",
    datetime.date(2024, 1, 1),
    {1, 2},
]
OVERRIDE_KEYS = [
    "",
    ".",
    "a..b",
    "data.\u00b2.path",
    "data.-1.path",
    "data.1.path",
    "data." + "9" * 5000,
    "x" + ".x" * 500,
]
SNIPPETS = [
    "\t",
    "\n",
    ":",
    "- ",
    "? ",
    "{",
    "[",
    "'",
    '"',
    "#",
    " #",
    "&a ",
    "*a",
    "<<: *a\n",
    "<<: {seed: 1, seed: 2}\n",
    "!!set ",
    "!!binary aGk=",
    "!!python/object/apply:os.getcwd []",
    "!x ",
    "---\n",
    "...\n",
    "%YAML 9.9\n",
    "\ufeff",
    "\x00",
    "\x07",
    "=",
    "|\n",
    ">-\n",
    "@",
    "`",
    "\r",
    "\x85",
    '"\\ud800"',
    '"\\UFFFFFFFF"',
    "0o17",
    "017",
    "1:30",
    "1e-4",
    ".nan",
    "2024-01-01",
    "seed: 0x" + "f" * 5000 + "\n",
    "seed: " + "9" * 5000 + "\n",
    "steps: 1\n",
    "[" * 2000,
    "\N{PILE OF POO}",
]


def place(tree: Any, key: Key, value: Any) -> Any:
    """A tree with one key set; whatever lies across its way is replaced."""
    if not key:
        return value
    if isinstance(key[0], int):
        items = tree if isinstance(tree, list) else [None]
        return [place(items[0] if items else None, key[1:], value), *items[1:]]
    known = tree if isinstance(tree, dict) else {}
    return {**known, key[0]: place(known.get(key[0]), key[1:], value)}


def written(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)).removesuffix("...\n").strip()


def outcome(text: str, overrides: list[str]) -> Recipe | str:
    """The recipe, which survives its own dump, or the one line of its refusal."""
    try:
        recipe = read_recipe(text, "fuzz.yaml", overrides)
    except RecipeError as error:
        line = str(error)
        assert line.isprintable() or re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*", line), ascii(line)
        line.encode()
        assert re.search(r"; hint: \S", line), line
        return line
    again = read_recipe(recipe.to_yaml(), "again.yaml")
    assert again == recipe
    assert again.resolved() == recipe.resolved() == json.loads(json.dumps(recipe.resolved()))
    return recipe


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[str]]:
    """(YAML, overrides): a recipe that ships or follows the schema, some keys set anew, and one thing done to it."""
    key, odd = draw(st.sampled_from(list(KEYS))), draw(st.sampled_from(ODD))
    tree = draw(st.sampled_from([*TREES, LEAST]) | fitting(SCHEMA))
    for other in draw(st.lists(st.sampled_from(list(KEYS)), max_size=2)):
        tree = place(tree, other, draw(fitting(KEYS[other])))
    match draw(st.integers(0, 6)):
        case 0:
            return written(tree), []
        case 1:
            return written(place(tree, key, odd)), []
        case 2:
            name = str(key[-1])
            wrong = draw(st.text() | st.sampled_from([name[1:], name + "s", name.upper(), name.replace("_", "-")]))
            return written(place(tree, (*key[:-1], wrong), odd)), []
        case 3:
            return written(tree), [f"{'.'.join(map(str, key))}={written(draw(fitting(KEYS[key]) | st.just(odd)))}"]
        case 4:
            where = draw(st.sampled_from(OVERRIDE_KEYS) | st.text())
            return written(tree), [where + draw(st.sampled_from(["=", "", "=="])) + draw(st.sampled_from(SNIPPETS))]
        case _:
            text = draw(st.sampled_from(list(SHIPPED.values())))
            for _ in range(draw(st.integers(1, 3))):
                at = draw(st.integers(0, len(text)))
                text = text[:at] + draw(st.sampled_from(SNIPPETS)) + text[at + draw(st.integers(0, 9)) :]
            return text, []


def test_any_recipe_is_read_or_refused_in_one_line() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=300, derandomize=True, database=None, deadline=datetime.timedelta(seconds=20))
    @given(cases())
    def fuzz(case: tuple[str, list[str]]) -> None:
        seen[type(outcome(*case)).__name__] += 1

    fuzz()
    assert min(seen["Recipe"], seen["str"]) > 30, seen  # neither all refused nor all let through


def test_every_key_takes_or_names_every_odd_value() -> None:
    faults = []
    for key, odd in ((key, odd) for key in KEYS for odd in ODD):
        tree = place(LEAST, key, odd)
        found = outcome(written(tree), [])
        if isinstance(found, str) and "not valid YAML" not in found and f": {key[0]}" not in found:
            faults.append((key, odd, found))
    assert not faults


def test_the_schema_reaches_every_key() -> None:
    assert {key for key in KEYS if len(key) == 1} == {
        (field.alias or name,) for name, field in Recipe.model_fields.items()
    }
    assert ("adapter", "targets", 0, "factor") in KEYS
    assert ("data", 0, "captions", 0) in KEYS


def test_a_value_is_told_in_brief_however_large() -> None:
    laughs = "a0: &a0 [ha, ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))
    for text in (
        laughs + "steps: *a19",  # 2 x 9^19 items, in one line
        f"steps: {'9' * 4000}",
        f"seed: 0x{'f' * 9000}",
        f"model: {'[' * 400}{']' * 400}",
        f"{'k' * 1000}: 1",
        f"base: {'x' * 10_000}",
    ):
        assert len(str(outcome(text, []))) < 700


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("seed: 010", 10),
        ("seed: 0o10", 8),
        ("seed: 1_000", 1000),
        ("seed: 2e3", 2000),
        ("model: 1:30", "1:30"),
        ("model: 2024-01-01", "2024-01-01"),
        ("model: =", "="),
        ('model: "\\ud83d\\ude00"', "\N{GRINNING FACE}"),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, found: object) -> None:
    tree = yaml_text.parse(text)
    recipe = Recipe.model_validate({**LEAST, **tree})
    assert getattr(recipe, next(iter(tree))) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nseed: 1", "key 'seed' twice (line 7, column 1)"),
        ("data: [{path: a, path: b}]", "key 'path' twice"),
        ("samples: {<<: {seed: 1, seed: 2}}", "key 'seed' twice"),
        ("samples: {prompts: !!set {a, b}}", "tag 'tag:yaml.org,2002:set' in a recipe"),
        ('seed: "\\ud800"', "a character that is none"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1: too few items"),
        ("out: ~no-such-user/x", "out: '~no-such-user/x' is the home of no user here"),
        ("samples: {seed: 18446744073709551616}", "samples.seed: Input should be less than"),
        ("data: [{path: ''}]", "data.0.path: String should have at least 1 character"),
        ("data: [{path: a, background: 'rgb(999, 0, 0)'}]", "'rgb(999, 0, 0)' is no colour"),
        ("batch: 5000000000", "batch: Input should be less than or equal to 1000000000, not 5000000000"),
    ],
)
def test_what_was_once_let_through_or_crashed(text: str, told: str) -> None:
    tree = yaml.safe_dump({key: value for key, value in LEAST.items() if not text.startswith(key)})
    assert told in str(outcome(tree + text, []))


def test_overriding_one_use_of_an_alias_leaves_the_others() -> None:
    text = "data: [&a {path: x}, *a]\nresolution: 512\nsteps: 1\nout: y"
    recipe = outcome(text, ["data.0.repeats=3"])
    assert isinstance(recipe, Recipe)
    assert [source.repeats for source in recipe.data] == [3, 1]

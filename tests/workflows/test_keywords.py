"""Workflows as functions of keywords, and options as a command spells them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import libreflux
from libreflux.cli.verb import Verb
from libreflux.errors import AdapterError, OptionError, OptionHint, RecipeError, RunError
from libreflux.printing import WITH_OPTIONS, get_logger
from libreflux.workflows.keywords import by_keywords


@dataclass(frozen=True)
class DrawOptions:
    """Attributes:
    prompt: what to draw.
    no_cfg_until: steps.
    """

    prompt: str
    no_cfg_until: int = 0


@dataclass(frozen=True)
class ListOptions:
    """Attributes:
    names: or one.
    """

    names: Sequence[str]
    sizes: Sequence[int] | None = None
    file: Path | str | None = None


def draw_with(options: DrawOptions) -> tuple[str, int]:
    """Draws."""
    return options.prompt, options.no_cfg_until


def kept_with(options: ListOptions) -> ListOptions:
    """Keeps."""
    return options


def test_a_workflow_takes_the_fields_of_its_options() -> None:
    draw = by_keywords(DrawOptions, draw_with)
    assert draw("a fox", no_cfg_until=2) == ("a fox", 2)
    assert draw.__name__ == "draw"
    assert list(inspect.signature(draw).parameters) == ["prompt", "no_cfg_until"]
    assert (draw.__doc__ or "").startswith("Draws.\n\nArgs:")
    wrong: Any = draw
    with pytest.raises(TypeError, match="guidance"):
        wrong("a fox", guidance=3)


def test_an_empty_option_is_refused_where_it_is_no_text_to_draw() -> None:
    with pytest.raises(OptionError, match="prompt: is empty; hint: give it a value"):
        by_keywords(DrawOptions, draw_with)("")
    with pytest.raises(OptionError, match="out: is empty"):
        libreflux.generate("a fox", out="")


@pytest.mark.parametrize(
    ("workflow", "given", "told"),
    [
        ("average", {"run": 3}, "run: cannot be 3; hint: give a path"),
        ("average", {"width": "wide"}, "width: cannot be 'wide'; hint: give a number"),
        ("average", {"width": 0.1, "step": 1.5}, "step: cannot be 1.5; hint: use a whole number from 0"),
        ("average", {"out": "a\0.safetensors"}, r"out: cannot be 'a\\x00.safetensors'; hint: give a path"),
        ("average", {"out": "\ud800.safetensors"}, r"out: cannot be '\\ud800.safetensors'; hint: give a path"),
        ("export", {"what": "x", "int8": "no"}, "int8: cannot be 'no'; hint: give True or False"),
        ("merge", {"model": None}, "model: cannot be None; hint: give a text"),
        ("merge", {"adapters": [3]}, "adapters: cannot be 3; hint: give a text"),
        ("merge", {"adapters": b"x"}, "adapters: cannot be b'x'; hint: give a text"),
        ("train", {"recipe": {}, "overrides": 3}, "overrides: cannot be 3; hint: give a list of texts"),
        ("demo_data", {"seed": 1.5}, "seed: cannot be 1.5; hint: use a whole number from 0"),
        ("demo_data", {"count": True}, "count: cannot be True; hint: use a whole number from 1"),
        ("demo_data", {"progress": None}, "progress: cannot be None; hint: give a function"),
        ("demo", {"steps": "many"}, "steps: cannot be 'many'; hint: give a whole number"),
        ("generate", {"prompts": "x", "model": 3}, "model: cannot be 3; hint: give a text, a path or None"),
        ("grid", {"prompts": "x", "out": ["grid"]}, r"out: cannot be \['grid'\]; hint: give a text or a path"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused_in_one_line(
    workflow: str, given: dict[str, Any], told: str, tmp_path: Path
) -> None:
    needed = {"average": {"run": "r"}, "merge": {"model": "m", "adapters": "a"}, "train": {}}
    out = {} if workflow == "train" else {"out": tmp_path / "new"}
    with pytest.raises(OptionError, match=f"^{told}"):
        getattr(libreflux, workflow)(**needed.get(workflow, {}) | out | given)
    assert not list(tmp_path.iterdir())


def test_lists_may_be_iterators_and_single_values() -> None:
    found = by_keywords(ListOptions, kept_with)(iter(["a", "b"]), sizes=3, file=Path("x"))  # type: ignore[arg-type]
    assert found == ListOptions(("a", "b"), sizes=3, file=Path("x"))  # type: ignore[arg-type]


def test_a_path_may_begin_with_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made = libreflux.demo_data("~/python", count=1)
    assert made.folder == tmp_path / "home" / "python"
    assert run("export", "emoji-base", "--for", "diffusers", "--out=~/command").code == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["command", "python"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    with pytest.raises(AdapterError, match=f"^{tmp_path / 'home' / 'a.safetensors'}: no such adapter file"):
        libreflux.merge("emoji-base", "~/a.safetensors", out="m")


def test_an_option_is_named_as_the_caller_typed_it() -> None:
    error = OptionError("does what `guidance_start` does", "no_cfg_until", hint="remove `no_cfg_until` or `other`")
    assert str(error) == "no_cfg_until: does what `guidance_start` does; hint: remove `no_cfg_until` or `other`"
    names = {"guidance_start": "--guidance-start", "no_cfg_until": "--no-cfg-until"}
    told = error.spelled(names)
    assert str(told) == "--no-cfg-until: does what --guidance-start does; hint: remove --no-cfg-until or `other`"
    assert type(told) is RecipeError


def test_one_of_an_options_values_may_be_named() -> None:
    error = OptionError("does nothing for int8", "offload", value="sequential", hint="use `offload` model")
    assert str(error) == "offload sequential: does nothing for int8; hint: use `offload` model"
    told = error.spelled({"offload": "--offload", "sequential": "--wrong"})
    assert str(told) == "--offload sequential: does nothing for int8; hint: use --offload model"


def test_a_verb_spells_its_own_options() -> None:
    import typer

    app = typer.Typer()

    @app.command(cls=Verb)
    def draw(
        prompts: list[str] = typer.Argument(metavar="PROMPT..."),
        adapters: list[str] = typer.Option([], "--adapter"),
        no_cfg_until: int = 0,
    ) -> None:
        raise OptionError("are too many beside `prompts`", "adapters", hint="remove `no_cfg_until`")

    with pytest.raises(RecipeError, match=r"^--adapter: are too many beside PROMPT; hint: remove --no-cfg-until$"):
        app(["a fox"], standalone_mode=False)


def test_a_verb_spells_hints_that_say_so_and_no_others() -> None:
    """Recipes have keys of the same names, such as `out`, which are typed without dashes."""
    import typer

    app = typer.Typer()

    @app.command(cls=Verb)
    def draw(own: bool = False, out: str = "x") -> None:
        hint = "choose another `out`"
        raise RunError("is taken", where="x", hint=OptionHint(hint) if own else hint)

    with pytest.raises(RunError, match=r"^x: is taken; hint: choose another --out$"):
        app(["--own"], standalone_mode=False)
    with pytest.raises(RunError, match=r"^x: is taken; hint: choose another `out`$"):
        app([], standalone_mode=False)


def test_a_verb_spells_warnings_that_say_so_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    import typer

    app, logger = typer.Typer(), get_logger("libreflux.test")

    @app.command(cls=Verb)
    def draw(out: str = "x") -> None:
        logger.warning("name %s with `out`, not `model`", "%s", extra=WITH_OPTIONS)
        logger.warning("choose another `out`")

    app([], standalone_mode=False)
    logger.warning("a call's `out`", extra=WITH_OPTIONS)
    told = ["name %s with --out, not `model`", "choose another `out`", "a call's `out`"]
    assert [record.getMessage() for record in caplog.records] == told

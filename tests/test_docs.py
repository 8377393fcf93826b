"""What README.md, CONTRIBUTING.md and docs/ name exists: definitions, files, links, verbs, options and recipe keys."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.main import get_command

from libreflux.cli.app import app
from libreflux.cli.verb import every_verb
from libreflux.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
HISTORY = ("log.md", "CHANGELOG.md")
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if path.name not in HISTORY)


@pytest.fixture(scope="module")
def names() -> ModuleType:
    """The module that the site's build finds definitions with."""
    spec = importlib.util.spec_from_file_location("names", ROOT / "docs" / "_ext" / "names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["names"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def test_a_name_is_found_where_it_is_defined_and_one_that_is_gone_is_refused(names: ModuleType) -> None:
    place = names.locate("libreflux.flow.path.velocity_target")
    line = (ROOT / place.file).read_text("utf-8").splitlines()[place.line - 1]
    assert place.file == "src/libreflux/flow/path.py"
    assert line.startswith("def velocity_target(")
    assert names.locate("libreflux.open_model").file != "src/libreflux/__init__.py"
    assert names.locate("guidance_scale") is None
    for gone in ("libreflux.flow.path.no_such", "libreflux.no_such", "tests/test_docs.py::no_such", "docs/no_such.md"):
        with pytest.raises(names.UnknownNameError, match=re.escape(gone)):
            names.locate(gone)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_a_page_names_exists(page: Path, names: ModuleType) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        names.locate(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_commands_of_the_pages_have_verbs_and_options_that_exist() -> None:
    verbs = every_verb(get_command(app))
    found = 0
    for page in PAGES:
        for line in "".join(_blocks(page, "sh")).splitlines():
            words = shlex.split(line, comments=True)
            if not words or Path(words[0]).name != "libreflux" or len(words) == 1:
                continue
            verb = verbs.get(words[1]) or verbs.get(" ".join(words[1:3]))
            assert verb is not None, f"{page.name}: {line}"
            known = {option for param in verb.params for option in (*param.opts, *param.secondary_opts)}
            unknown = [word for word in words[2:] if word.startswith("--") and word.partition("=")[0] not in known]
            assert not unknown, f"{page.name}: {line}"
            found += 1
    assert found > 30


def test_recipes_in_the_pages_have_keys_that_exist() -> None:
    known = {field.alias or name for name, field in Recipe.model_fields.items()}
    blocks = [block for page in PAGES for block in _blocks(page, "yaml")]
    assert len(blocks) >= 5
    for block in blocks:
        assert set(yaml.safe_load(block)) <= known, block


def test_recipes_beside_the_pages_are_whole() -> None:
    recipes = sorted((ROOT / "docs").glob("*.yaml"))
    assert len(recipes) >= 2
    for path in recipes:
        assert load_recipe(path).out.startswith("out/")


def test_python_in_the_pages_imports_what_exists(names: ModuleType) -> None:
    found = 0
    for page in PAGES:
        for node in ast.walk(ast.parse("\n".join(_blocks(page, "python")))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("libreflux"):
                found += len([names.locate(f"{node.module}.{one.name}") for one in node.names])
    assert found >= 4


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 110

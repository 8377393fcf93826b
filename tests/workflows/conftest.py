"""The command line, a tiny trained run and its pictures, as the tests of the verbs have them."""

from cli.conftest import judge, pictures, plain, recipe, run_fixture, trained
from probed import measure, mixed, no_sections

__all__ = ["judge", "measure", "mixed", "no_sections", "pictures", "plain", "recipe", "run_fixture", "trained"]

"""The command line, a tiny trained run and its pictures, as the tests of the verbs have them."""

from cli.conftest import judge, pictures, recipe, run_fixture, trained

__all__ = ["judge", "pictures", "recipe", "run_fixture", "trained"]

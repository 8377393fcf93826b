"""A verb whose empty arguments are refused: mostly a variable of the shell that is not set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand

from libreflux.errors import RecipeError

TEXTS = {"prompts", "prompt_2", "negative", "negative_2"}
"""Parameters that may be empty: an empty text is one too."""


class Verb(TyperCommand):
    """Of typer's commands, one that takes "" for a text alone: as a path it would be the folder that one stands in."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for where, name, value in self._given(args):
            if not value and name not in TEXTS:
                mend = "give it a value, or leave it out; is a variable not set?"
                raise RecipeError("is empty", where=where, mend=mend)
        return super().parse_args(ctx, args)

    def _given(self, args: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """(as written, parameter, value) of what a command line gives; options without a value are left out."""
        options = {text: param for param in self.params for text in (*param.opts, *param.secondary_opts)}
        positional = next((param for param in self.params if param.param_type_name == "argument"), None)
        rest = iter(args)
        for arg in rest:
            text, equals, value = arg.partition("=")
            option = options.get(text) if text.startswith("-") else None
            if option is not None and not getattr(option, "is_flag", False):
                yield text, str(option.name), value if equals else next(rest, "?")
            elif option is None and positional is not None and not arg.startswith("-"):
                yield positional.metavar or str(positional.name).upper(), str(positional.name), arg

"""The verbs, and what becomes of errors: a user's mistake is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import functools
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

import libreflux
from libreflux.cli import (
    average,
    caption,
    demo,
    demo_data,
    diff,
    export,
    generate,
    grid,
    inspect,
    lists,
    merge,
    prepare,
    probe,
    train,
)
from libreflux.cli.verb import Verb, Verbs
from libreflux.errors import LibrefluxError, RecipeError, RunError
from libreflux.places import PLACE_ERRORS, WRITE_ERRORS
from libreflux.printing import never_fail, say, say_table
from libreflux.processes import ask_for_large_pages
from libreflux.training.interrupt import unwinding

app = typer.Typer(
    name="libreflux",
    cls=Verbs,
    help="Sets distilled FLUX models free: prepares data, trains adapters, merges them, draws with true guidance.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""Click's ClickException, wherever this version of typer keeps it."""


def _version(asked: bool) -> None:
    if asked:
        say(f"libreflux {libreflux.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        say_table(context.get_help())


app.command("demo", cls=Verb)(demo.demo)
app.command("generate", cls=Verb)(generate.generate)
app.command("grid", cls=Verb)(grid.grid)
app.command("prepare", cls=Verb)(prepare.prepare)
app.command("caption", cls=Verb)(caption.caption)
app.command("train", cls=Verb)(train.train)
app.command("merge", cls=Verb)(merge.merge)
app.command("average", cls=Verb)(average.average)
app.command("probe", cls=Verb)(probe.probe)
app.command("diff", cls=Verb)(diff.diff)
app.add_typer(inspect.group, name="inspect")
app.command("export", cls=Verb)(export.export)
app.command("demo-data", cls=Verb)(demo_data.demo_data)
app.command("recipe", cls=Verb)(lists.recipe)
app.command("models", cls=Verb)(lists.models)


@functools.cache
def command_line() -> Any:
    """All of the above as a parser, made once a process."""
    return typer.main.get_command(app)


def _refuse(line: str, code: int = 2) -> NoReturn:
    say(f"libreflux: error: {line}", err=True)
    sys.exit(code)


def _of_a_device(error: Exception) -> LibrefluxError | None:
    """The line for memory that ran out, or a card that failed, where no verb has said more of it."""
    if "torch" not in sys.modules:
        return None
    from libreflux.model import device_faults

    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "libreflux")
    return device_faults.told(
        error, verb, "smaller sizes, or --device cpu where the verb has it (a recipe: device: cpu)"
    )


def _recipe_key(error: Exception) -> str:
    """The hint for a key of a recipe that is written as an option, `train r.yaml --lr 1e-4`."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if option is None or context is None or context.info_name != "train" or not hasattr(error, "possibilities"):
        return ""
    from libreflux.recipe import Recipe
    from libreflux.recipe.faults import meant_key

    name = option.lstrip("-").replace("-", "_")
    key = name if name.partition(".")[0] in Recipe.model_fields else meant_key(name)
    return f". Keys of the recipe go without dashes: {key}=VALUE." if key else ""


def _check_folder() -> None:
    """Raises RunError in a folder that was removed: libraries that are loaded there end the process without a word."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise RunError("the current folder has been removed", hint="change to one that is there") from None


def _check_arguments() -> None:
    """Raises RecipeError for an argument that is not UTF-8: prompts and names go into files that are."""
    for word in sys.argv[1:]:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            hint = "write it as UTF-8 (a file: rename it; a terminal: use a UTF-8 locale)"
            raise RecipeError("is not UTF-8", where=word, hint=hint)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 a user's mistake, 129, 130, 143 a signal, 1 a card or a bug."""
    never_fail()
    ask_for_large_pages()
    try:
        with unwinding():
            _check_folder()
            _check_arguments()
            code = command_line()(prog_name="libreflux", standalone_mode=False)
    except LibrefluxError as error:
        if error.code != 2 and os.environ.get("LIBREFLUX_TRACEBACK"):
            raise
        _refuse(str(error), error.code)
    except OSError as error:
        full = error.errno in WRITE_ERRORS  # of which the system names no file
        if error.errno not in PLACE_ERRORS or (error.filename is None and not full):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _refuse(f"{where}{error.strerror}; hint: name another place, or make room or rights there")
    except (MemoryError, RuntimeError) as error:
        line = _of_a_device(error)
        if line is None or os.environ.get("LIBREFLUX_TRACEBACK"):
            raise
        _refuse(str(line), line.code)
    except typer.Abort:
        sys.exit(130)
    except _UsageError as error:
        message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        context = getattr(error, "ctx", None)
        _refuse(f"{message}{_recipe_key(error)} See {context.command_path if context else 'libreflux'} --help")
    sys.exit(code if isinstance(code, int) else 0)

"""The verbs, and what becomes of errors: a user's mistake is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

import libreflux
from libreflux.cli import average, demo, demo_data, export, generate, grid, merge, prepare, probe, train
from libreflux.errors import LibrefluxError
from libreflux.files import PLACE_ERRORS, WRITE_ERRORS
from libreflux.train.interrupt import unwinding

app = typer.Typer(
    name="libreflux",
    help="Sets distilled FLUX models free: prepares data, trains adapters, merges them, draws with true guidance.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""Click's ClickException, wherever this version of typer keeps it."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"libreflux {libreflux.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("grid")(grid.grid)
app.command("prepare")(prepare.prepare)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.command("average")(average.average)
app.command("probe")(probe.probe)
app.command("export")(export.export)
app.command("demo-data")(demo_data.demo_data)


def _refuse(line: str, code: int = 2) -> NoReturn:
    print(f"libreflux: error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _of_a_device(error: Exception) -> LibrefluxError | None:
    """The line for memory that ran out, or a card that failed, where no verb has said more of it."""
    if "torch" not in sys.modules:
        return None
    from libreflux.model import faults

    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "libreflux")
    return faults.told(error, verb, "smaller sizes, or --device cpu where the verb has it (a recipe: device: cpu)")


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 a user's mistake, 129, 130, 143 a signal, 1 a card or a bug."""
    try:
        with unwinding():
            code = app(prog_name="libreflux", standalone_mode=False)
    except LibrefluxError as error:
        if error.code != 2 and os.environ.get("LIBREFLUX_TRACEBACK"):
            raise
        _refuse(str(error), error.code)
    except OSError as error:
        full = error.errno in WRITE_ERRORS  # of which the system names no file
        if error.errno not in PLACE_ERRORS or (error.filename is None and not full):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _refuse(f"{where}{error.strerror}; mend: name another place, or make room or rights there")
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
        _refuse(f"{message} See {context.command_path if context else 'libreflux'} --help")
    sys.exit(code if isinstance(code, int) else 0)

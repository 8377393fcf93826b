"""Text on its way to a terminal or a log: what a terminal would obey, or cannot encode, is shown as an escape."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

# Control characters, lone surrogates, line ends of Unicode's, and marks that turn the direction of what follows.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    """A text with every character that a terminal obeys or cannot encode as `\\x1b` or `\\ud83d`.

    Args:
        text: anything; `str` is asked what it says.
        keep: characters that stay, e.g. a line end in a table of our own.
    """

    def shown(found: re.Match[str]) -> str:
        code = ord(found[0])
        return found[0] if found[0] in keep else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(shown, str(text))


def shortened(text: object, most: int = 600) -> str:
    """A text of at most so many characters: of a longer one the middle is left out."""
    whole = str(text)
    half = (most - 1) // 2
    return whole if len(whole) <= most else f"{whole[:half]}…{whole[-half:]}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """ "1 picture", "1,200 pictures": a count and what it counts.

    Args:
        count: how many.
        noun: one of them.
        plural: several of them; None: the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def readable(number: float, digits: int = 3) -> str:
    """A number in so many digits at least, and without the exponent that `g` gives to large ones: 1.23, 12.3, 1,234."""
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def fold(text: str, width: int, indent: str = "  ") -> str:
    """A text of several lines, of which those that are longer than `width` go on indented; no word is broken."""

    def folded(line: str) -> list[str]:
        if len(line) <= width:
            return [line]
        rest = " " * (len(line) - len(line.lstrip())) + indent
        return textwrap.wrap(
            line, width, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
        )

    return "\n".join(part for line in text.split("\n") for part in folded(line))


def quoted_command(words: Iterable[object], *, windows: bool = os.name == "nt") -> str:
    """A command line that gives a program these words when it is pasted into a shell.

    Args:
        words: of the command; `str` is asked what each says.
        windows: whether it is read by the rules of Windows; else by those of POSIX shells.
    """
    texts = [str(word) for word in words]
    return " ".join(map(_quoted_for_windows, texts)) if windows else shlex.join(texts)


def _quoted_for_windows(word: str) -> str:
    """By the rules of programs there, and in quotes where cmd.exe would take a letter for an order of its own."""
    quoted = subprocess.list2cmdline([word])
    return f'"{quoted}"' if not quoted.startswith('"') and set("&|<>^()") & set(word) else quoted


def quoted_path(path: str, *, windows: bool = os.name == "nt") -> str:
    """A path as a word of a command line; `~/` at its start is the home, which shells of Windows do not write out.

    Args:
        path: as a file keeps it.
        windows: see `quoted_command`.
    """
    if not path.startswith("~/") or len(path) == 2:
        return quoted_command([path], windows=windows)
    if windows:
        return quoted_command([os.path.expanduser(path)], windows=True)
    return f"~/{quoted_command([path[2:]], windows=False)}"


WITH_OPTIONS = {"with_options": True}
"""`extra` of a message in which words in backquotes are options, which a command shows as they are typed there."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of ours: its messages are printable, whoever handles them."""
    logger = logging.getLogger(name)
    if not any(isinstance(one, _Printable) for one in logger.filters):
        logger.addFilter(_Printable())
    return logger


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True


def say(*lines: object, err: bool = False) -> None:
    """Prints lines to stdout or stderr, each on one line whatever is in it."""
    file = sys.stderr if err else sys.stdout
    for line in lines:
        print(printable(line), file=file, flush=True)


def say_table(text: str, *, err: bool = False) -> None:
    """Prints a text of several lines, such as a table, whose line ends stay."""
    say(*text.split("\n"), err=err)


def say_json(text: str) -> None:
    """Prints JSON to stdout, which stays JSON of the same values; a line end at its end is not doubled."""
    shown = _UNPRINTABLE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)
    print(shown.removesuffix("\n"), flush=True)


def never_fail() -> None:
    """From here on no work is lost for what is printed.

    stdout and stderr escape what their encoding lacks, as a file's name may; and a terminal that is lost, which refuses
    what is written to it before the system says so (SIGHUP), is written to no more.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if stream.isatty():
                setattr(sys, name, _lasting(stream))


def hush(handles: Sequence[int]) -> None:
    """Lets what is written to these files, by number, come to nothing, without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in handles:
        os.dup2(nowhere, handle)
    os.close(nowhere)


class _Terminal(io.FileIO):
    """A terminal's file; once the terminal is lost, what is written comes to nothing."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            hush([self.fileno()])
            return len(data)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = _Terminal(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)

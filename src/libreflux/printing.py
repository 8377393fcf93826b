"""Text on its way to a terminal or a log: what a terminal would obey, or cannot encode, is shown as an escape."""

from __future__ import annotations

import io
import logging
import re
import sys

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
    """From here on stdout and stderr escape what their encoding lacks: no work is lost for a file's name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

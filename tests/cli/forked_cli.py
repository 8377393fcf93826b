"""A process that has imported everything, and forks one `libreflux` for each line of its input.

    python forked_cli.py MODEL      opened once, for what is only imported then

In: a JSON line {"args": [...], "cwd": "...", "encoding": "of its stdout"}. Out: a JSON line [exit code, stdout,
stderr], caught at the file descriptors, so that what libraries print on their own is in it. A traceback is exit code
1, 20 seconds are minus SIGALRM, and 4 GiB more than the libraries take are a MemoryError. Whoever asks the network is
stopped with exit code 97.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import traceback

from libreflux.cli import main
from libreflux.workflows.drawing import open_for_drawing


def warm(model: str) -> None:
    open_for_drawing(model)
    for name in ("generate", "remake", "grid", "grid_page"):
        importlib.import_module(f"libreflux.workflows.{name}")
    sys.argv = ["libreflux", "generate"]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main()


def no_network(event: str, args: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        os.write(2, f"{event} {args}\n".encode())
        os._exit(97)


def address_space() -> int:
    """Bytes that this process has mapped: torch's libraries alone are 1 to 4 GiB, as it is built."""
    with open("/proc/self/statm", encoding="ascii") as sizes:
        return int(sizes.read().split()[0]) * resource.getpagesize()


def forked(args: list[str], cwd: str, encoding: str = "utf-8") -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.chdir(cwd)
                assert isinstance(sys.stdout, io.TextIOWrapper)
                sys.stdout.reconfigure(encoding=encoding, errors="strict")
                signal.alarm(20)
                limit = address_space() + 2**32
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                sys.addaudithook(no_network)
                sys.argv = ["libreflux", *args]
                main()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return os.waitstatus_to_exitcode(status), texts[0], texts[1]


if __name__ == "__main__":
    warm(sys.argv[1])
    gc.collect()
    gc.freeze()  # children need not look through all that was imported
    for line in sys.stdin:
        print(json.dumps(forked(**json.loads(line))), flush=True)
    gc.unfreeze()  # or libraries complain at the end of what was never freed

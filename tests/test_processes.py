"""What the command asks of its process before torch is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from libreflux.processes import LARGE_PAGES

ASKED = """
import os, sys
from libreflux.cli import main
sys.argv = ["libreflux", "models"]
try:
    main()
except SystemExit:
    print("PAGES", os.environ["THP_MEM_ALLOC_ENABLE"])
"""


@pytest.mark.parametrize("chosen", [None, "0"])
def test_the_command_asks_for_large_pages_unless_the_user_decided(chosen: str | None) -> None:
    assert LARGE_PAGES in ASKED
    environment = {name: value for name, value in os.environ.items() if name != LARGE_PAGES}
    if chosen is not None:
        environment[LARGE_PAGES] = chosen
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"PAGES {chosen or 1}" in done.stdout

"""The command line under a cap on the card's memory: python -m gpu.capped NOTE BYTES ARGUMENT…

BYTES 0 is no cap. At the end NOTE gets the most bytes that torch's allocator had reserved.
"""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

import torch

from libreflux.cli import main

if __name__ == "__main__":
    note, cap = Path(sys.argv[1]), int(sys.argv[2])
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    atexit.register(lambda: note.write_text(str(torch.cuda.max_memory_reserved())))
    sys.argv = ["libreflux", *sys.argv[3:]]
    main()

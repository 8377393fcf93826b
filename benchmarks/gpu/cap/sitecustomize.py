"""Python runs this at its start if the folder is in PYTHONPATH: limits to a process's use of a card, and its peaks.

CAP_GIB limits torch's CUDA memory. PEAK_LOG names a file that gets the peaks when the process ends. NOCUDNN=1 turns
cuDNN's attention off.
"""

from __future__ import annotations

import os


def _watched(cap: str | None, log: str | None) -> None:
    import atexit
    import sys
    import time

    import torch

    if not torch.cuda.is_available():
        return
    begun = time.time()
    if cap:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(cap) * 2**30 / whole)

    def told() -> None:
        import resource

        allocated, reserved = (
            peak() / 2**30 for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        )
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        line = (
            f"[peak] {' '.join(sys.argv[-3:])[-80:]}: allocated {allocated:.2f} GiB, reserved {reserved:.2f} GiB, "
            f"host {host:.2f} GiB, {time.time() - begun:.1f} s\n"
        )
        if log:
            with open(log, "a", encoding="utf-8") as file:
                file.write(line)
        else:
            sys.stderr.write(line)

    atexit.register(told)


if os.environ.get("CAP_GIB") or os.environ.get("PEAK_LOG"):
    _watched(os.environ.get("CAP_GIB"), os.environ.get("PEAK_LOG"))
if os.environ.get("NOCUDNN"):
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)

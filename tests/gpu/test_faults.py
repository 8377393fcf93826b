"""What a card that failed leads to: one line, in a process that is lost."""

from __future__ import annotations

import pytest

from gpu.alone import alone


@pytest.mark.usefixtures("needs_card")
def test_a_failed_kernel_is_one_line() -> None:
    line = alone("passes.failed_assertion")
    assert line.startswith("reading an embedding: the device failed (")
    assert "assert" in line
    assert "; hint: start again; CUDA_LAUNCH_BLOCKING=1" in line
    assert "\n" not in line

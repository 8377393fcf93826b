from __future__ import annotations

import pytest

from libreflux.cli.adapters import adapter_argument
from libreflux.cli.progress import clock, rate
from libreflux.errors import AdapterError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("odd:name.safetensors", ("odd:name.safetensors", 1.0)),
        ("C:/x/a.safetensors:2", ("C:/x/a.safetensors", 2.0)),
        ("C:/x/a.safetensors", ("C:/x/a.safetensors", 1.0)),
    ],
)
def test_adapter_argument(text: str, wanted: tuple[str, float]) -> None:
    assert adapter_argument(text) == wanted


@pytest.mark.parametrize("text", ["a.safetensors:", "a.safetensors:nan", "a.safetensors:inf", ":1", "a:b"])
def test_bad_weights_are_refused(text: str) -> None:
    with pytest.raises(AdapterError, match="is no weight"):
        adapter_argument(text)


def test_clock_and_rate() -> None:
    assert [clock(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]
    assert (rate(2.5, "step"), rate(0.25, "step"), rate(0, "step")) == ("2.5 steps/s", "4 s/step", "")

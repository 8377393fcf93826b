"""The reader on text that was rendered, without a network, and where it is not installed."""

from __future__ import annotations

import importlib.util
import socket
from importlib.metadata import files
from typing import Any

import numpy as np
import pytest

from lettered import sign
from libreflux.errors import OptionError, RunError
from libreflux.probing import reader as module
from libreflux.probing.metrics.letters import read_letters
from libreflux.probing.reader import Reader, require_reader


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def test_rendered_text_is_read_without_a_network(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SETTINGS, "Det.limit_side_len", 256)  # not enlarged: eight times as fast
    reader = Reader()
    assert reader.name.startswith("rapidocr ")
    lines = reader.read(np.asarray(sign(["Hello World", "Café 24", "FREE BEER", "OPXN", "DOR"], step=48)))
    assert read_letters(["FREE BEER", "hello world", "Café 24"], lines).share == 1
    assert read_letters(["FREE BEER", "hello world", "Café 24"], lines).extra == len("OPXNDOR")
    assert read_letters(["OPEN DOOR"], lines).share == 1 - 2 / 8  # one letter is another, one is missing
    assert reader.read(np.full((64, 64, 3), 200, np.uint8)) == []


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    require_reader()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError) as refused:
        require_reader()
    assert str(refused.value) == (
        "ocr: needs rapidocr and onnxruntime, which are not installed; hint: pip install 'libreflux[ocr]'"
    )


def test_models_are_those_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [file for file in files("rapidocr") or () if "_rec_" not in file.name]
    monkeypatch.setattr(module, "files", lambda name: listed)
    with pytest.raises(RunError, match="has 0 models for 'rec', not one; hint: install its wheel anew"):
        Reader()

"""Addresses of servers, as people write them and as they may not be."""

from __future__ import annotations

import pytest

from libreflux.captioning.endpoint import Endpoint
from libreflux.errors import OptionError


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://a/v1",
        "http://",
        "http://u:sk-key@a/v1",
        "http://a/v1?key=sk-key",
        "http://a/v1#sk-key",
        "http://a:x/v1",
        "http://a b/v1",
        "http://a/v1\r\nX-Other: 1",
    ],
)
def test_odd_addresses_are_refused(url: str) -> None:
    with pytest.raises(OptionError) as error:
        Endpoint.parse(url)
    assert "sk-key" not in str(error.value)
    assert error.value.option == "endpoint"


def test_addresses_as_people_write_them() -> None:
    for text in ("http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"):
        assert str(Endpoint.parse(text)) == "http://h:1/v1"
    assert str(Endpoint.parse("https://[::1]/v1")) == "https://[::1]:443/v1"
    assert str(Endpoint.parse("http://localhost")) == "http://localhost:80"

"""Addresses of servers, as people write them and as they may not be."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from libreflux.captioning.endpoint import Client, Endpoint, ExchangeFailed
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
        "http://u:sk-key@a:x/v1",
        "http://u:sk-key@a\u2100/v1",
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


def test_a_host_that_can_be_no_name_is_not_reached() -> None:
    for host in ("a..b", "a" * 70):
        with pytest.raises(ExchangeFailed):
            Client(Endpoint.parse(f"http://{host}/v1"), None, 1.0).exchange("GET", "/models")


def test_closing_ends_a_reply_that_never_ends() -> None:
    """Its head has come, and its body goes on for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = Client(Endpoint.parse(f"http://127.0.0.1:{listening.getsockname()[1]}/v1"), None, 60.0)
        found: list[object] = []
        asking = threading.Thread(target=lambda: found.append(client.exchange("GET", "/models")))
        asking.start()
        held, _ = listening.accept()
        with held:
            held.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf")
            time.sleep(0.2)  # it has read so far
            client.close()
            asking.join(5)
            assert not asking.is_alive()
        with pytest.raises(ExchangeFailed, match="stopped"):
            client.exchange("GET", "/models")

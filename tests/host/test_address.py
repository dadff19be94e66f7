from __future__ import annotations

import os
import socket

import pytest

from lunashm.errors import SettingsError
from lunashm.host.address import Address, holder, is_private


@pytest.mark.parametrize(
    ("text", "host", "port", "again"),
    [
        ("9400", "127.0.0.1", 9400, "127.0.0.1:9400"),
        ("0", "127.0.0.1", 0, "127.0.0.1:0"),
        ("0.0.0.0:65535", "0.0.0.0", 65535, "0.0.0.0:65535"),
        ("localhost:9400", "localhost", 9400, "localhost:9400"),
        ("[::1]:9400", "::1", 9400, "[::1]:9400"),
    ],
)
def test_what_people_write(text: str, host: str, port: int, again: str) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, again)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "a port from 0"), ("on", "a port from 0"), ("-1", "a port from 0"), ("65536", "a port from 0"),
        ("9" * 5000, "a port from 0"), ("localhost", "a port from 0"), ("localhost:", "a port from 0"), ("²", "a port"),
        (":9400", "name the address"), ("::1:9400", "in brackets"), ("[lo]:1", "in brackets"), ("[::1]", "a port from"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_what_would(text: str, advice: str) -> None:
    with pytest.raises(SettingsError, match=r"use PORT, ADDRESS:PORT or \[IPV6\]:PORT") as error:
        Address.parse(text)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("ip", "private"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("192.168.1.1", False), ("fe80::1%eth0", False)],
)  # fmt: skip
def test_only_the_loopback_is_private(ip: str, private: bool) -> None:
    assert is_private(ip) is private


def test_holder_of_a_port_is_named_while_it_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert holder(port).startswith(f"pid {os.getpid()} (")
    assert holder(port) == ""

"""Where metrics are served: what people write, and who is there already. Opens no socket."""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import dataclass
from typing import Self

import psutil

from lunashm.errors import SettingsError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """A TCP address to listen at. ``port`` 0: a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """``PORT`` (on the loopback), ``ADDRESS:PORT``, ``[IPV6]:PORT``. Raises SettingsError."""
        host, colon, port = text.rpartition(":")
        wrong = f"metrics is {text!r}; use PORT, ADDRESS:PORT or [IPV6]:PORT"
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16):
            raise SettingsError(f"{wrong}, with a port from 0 (any free one) to 65535")
        if colon and not host:
            raise SettingsError(f"{wrong}; to open it to the network name the address, 0.0.0.0 for all")
        bracketed = host.startswith("[") and host.endswith("]")
        if (":" in host) is not bracketed:
            raise SettingsError(f"{wrong}; only IPv6 addresses are, and have to be, in brackets")
        return cls(host.strip("[]") or LOOPBACK, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_private(ip: str) -> bool:
    """Whether only this machine's own processes reach it."""
    return ipaddress.ip_address(ip.partition("%")[0]).is_loopback


def holder(port: int) -> str:
    """Who listens on ``port``, as far as /proc tells this user; empty where it does not."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr[1:] == (port,):
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""

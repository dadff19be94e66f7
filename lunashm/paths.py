"""Where a host can be found: the runtime directory, endpoint names, the lock that says a host is alive.

A host holds an exclusive flock on ``<endpoint>.lock`` for as long as it lives, so "is anyone there?" needs no
time-out: the kernel drops the lock with the process, even across PID namespaces.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import platformdirs

from lunashm.errors import AlreadyServing, HostUnavailable, SettingsError
from lunashm.protocol import HostInfo

_SUN_PATH_MAX = 107
"""Bytes a Unix socket's path may have on Linux."""

_INFO_NBYTES = 1 << 16


def runtime_dir() -> Path:
    """The directory for sockets and locks, mode 0700 and ours. Raises SettingsError where it is someone else's."""
    directory = Path(os.environ.get("LUNASHM_RUNTIME_DIR") or platformdirs.user_runtime_path("lunashm")).absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = directory.stat()
    except OSError as exc:
        raise SettingsError(
            f"cannot use {directory} for sockets and locks: {exc.strerror}; set LUNASHM_RUNTIME_DIR to another"
        ) from exc
    if owner.st_uid != os.getuid():
        raise SettingsError(f"{directory} is uid {owner.st_uid}'s; set LUNASHM_RUNTIME_DIR to a directory of yours")
    if stat.S_IMODE(owner.st_mode) & 0o077:
        directory.chmod(0o700)
    return directory


@dataclass(frozen=True)
class Endpoint:
    """One host's addresses, all derived from the control URL ``ipc:///path/name.sock``."""

    url: str

    @classmethod
    def for_device(cls, device: str) -> Endpoint:
        name = "".join(c if c.isalnum() or c == "-" else "_" for c in device)
        return cls.parse(f"ipc://{runtime_dir() / name}.sock")

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Raises SettingsError for anything but an absolute ipc path short enough for a Unix socket."""
        if not url.startswith("ipc:///"):
            raise SettingsError(
                f"endpoint {url!r} is not ipc:///absolute/path.sock; other transports are not supported "
                "(TCP would need CURVE keys, which this version does not have)"
            )
        endpoint = cls(url if url.endswith(".sock") else url + ".sock")
        longest = max(len(os.fsencode(path)) for path in endpoint.socket_paths)
        if longest > _SUN_PATH_MAX:
            raise SettingsError(
                f"socket path of {url!r} has {longest} bytes, Unix sockets allow {_SUN_PATH_MAX}; "
                "set LUNASHM_RUNTIME_DIR to a shorter directory"
            )
        return endpoint

    @property
    def device(self) -> str:
        """What an endpoint of that name is for, ``cpu`` or a GPU's UUID; empty for a name of another kind."""
        name = self.socket_path.name.removesuffix(".sock")
        return name if name == "cpu" or name.startswith(("GPU-", "MIG-")) else ""

    @property
    def flag(self) -> str:
        """What a command is given to mean the host of this endpoint: `` --device GPU-...``, empty for the CPU's own."""
        device = self.device
        if not device or self != Endpoint.for_device(device):
            return f" --endpoint {self.url}"
        return "" if device == "cpu" else f" --device {device}"

    @property
    def _stem(self) -> str:
        return self.url.removesuffix(".sock")

    @property
    def socket_path(self) -> Path:
        return Path(self.url.removeprefix("ipc://"))

    @property
    def events(self) -> str:
        return self._stem + ".events.sock"

    @property
    def events_path(self) -> Path:
        return Path(self.events.removeprefix("ipc://"))

    @property
    def fds_path(self) -> Path:
        """Where descriptors are handed over; no ZeroMQ there."""
        return Path(self._stem.removeprefix("ipc://") + ".fds.sock")

    @property
    def socket_paths(self) -> tuple[Path, ...]:
        """All that a host listens on."""
        return self.socket_path, self.events_path, self.fds_path

    @property
    def lock_path(self) -> Path:
        return Path(self._stem.removeprefix("ipc://") + ".lock")


class HostLock:
    """Held by the one host of an endpoint while it lives."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._fd = -1

    def acquire(self, patience_s: float = 1.0) -> None:
        """Raises AlreadyServing, naming the pid. Patience covers a client that is just probing the lock."""
        path = self._endpoint.lock_path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise SettingsError(f"cannot open the lock file {path}: {exc.strerror}; choose another --endpoint") from exc
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                os.close(fd)
                holder = find_host(self._endpoint)
                who = f"pid {holder.pid}" if holder else "another process"
                raise AlreadyServing(
                    f"{who} already serves {self._endpoint.url}; use it as it is, or stop it first "
                    f"(lunashm stop{self._endpoint.flag})"
                ) from None
        self._fd = fd
        os.ftruncate(fd, 0)  # what a killed host left there: nobody may take it for us while we start

    def publish(self, info: HostInfo) -> None:
        """Write who we are, for :func:`find_host`: from now on clients come."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, msgspec.json.encode(info), 0)

    def withdraw(self) -> None:
        """Nobody shall find us any more, nor go on with memory that dies with us: what is freed is freed after this."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)

    def release(self) -> None:
        """The file stays: unlinking a lock file races with the next host taking it."""
        self.withdraw()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def find_host(endpoint: Endpoint) -> HostInfo | None:
    """The live host of ``endpoint``, or None. Never blocks."""
    try:
        fd = os.open(endpoint.lock_path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return published_in(fd)[1]
        return None
    finally:
        os.close(fd)


def published_in(lock: int) -> tuple[bytes, HostInfo | None]:
    """What the lock file ``lock`` holds, and the host that wrote it; None for one that starts up or stops."""
    written = os.pread(lock, _INFO_NBYTES, 0)
    try:
        return written, msgspec.json.decode(written, type=HostInfo)
    except msgspec.DecodeError:
        return written, None


def nobody_at(endpoint: Endpoint) -> HostUnavailable:
    """That no host lives at ``endpoint``, which hosts there are instead, and how to start the one that is missing."""
    found = [(host.device_name, other.flag) for other in all_endpoints() if (host := find_host(other)) is not None]
    others = [f"{name} ({flag.strip() or '--device cpu'})" for name, flag in found]
    there = f", there are hosts for {' and '.join(others)}" if others else ""
    return HostUnavailable(f"no lunashm host at {endpoint.url}{there}; start one with: lunashm serve{endpoint.flag}")


def all_endpoints() -> list[Endpoint]:
    """Every endpoint in the runtime directory that a host has ever used."""
    return [Endpoint(f"ipc://{lock.with_suffix('.sock')}") for lock in sorted(runtime_dir().glob("*.lock"))]

"""Whether memory that dies with its host is still the host's: for rungs whose bytes do not outlive it (``cuda-ipc``).

When the exporter of a legacy CUDA IPC handle ends, what importers read is undefined, and nothing tells them. So a
client watches the host from before it maps, and asks before and after each use. The order matters:

- *before* says: do not start on memory that is gone;
- *after* (synchronised with the device) says: what was computed meanwhile is good, or must be thrown away.

For that the answer must never be late. A dying process sets PF_EXITING in all its threads before it closes a single
descriptor of the driver, and a host that stops properly withdraws its lock file before it frees anything; a pidfd alone
becomes readable only after the descriptors were closed. So all three are asked.
"""

from __future__ import annotations

import os
import select
import weakref
from collections.abc import Callable

from lunashm.errors import HostLost, SharedMemoryError
from lunashm.paths import Endpoint, published_in
from lunashm.process import is_exiting, pidfd_of, stat_of
from lunashm.protocol import HostInfo


class HostWatch:
    """Watches ``host`` until this object is gone. Any thread may ask; that takes three system calls, no descriptor.

    Raises HostLost where it is gone already, SharedMemoryError where its process cannot be watched from here.
    """

    def __init__(self, endpoint: Endpoint, host: HostInfo) -> None:
        self._host = host
        self._lost = ""
        pidfd = pidfd_of(host.pid, host.pid_namespace)
        if pidfd is None:
            raise SharedMemoryError(
                f"the host's memory ({host.rung}) dies with its process, pid {host.pid}, which cannot be watched from "
                "here (another PID namespace, or no pidfd): give both the same one (docker: --pid=host), or have the "
                "host share by another rung (lunashm serve --memory cuda-vmm)"
            )
        self._pidfd = self._kept(pidfd)
        try:
            self._stat = self._kept(stat_of(host.pid))
            self._lock = self._kept(os.open(endpoint.lock_path, os.O_RDONLY | os.O_CLOEXEC))
            self._published, there = published_in(self._lock)
        except OSError as exc:
            raise SharedMemoryError(f"the host (pid {host.pid}) cannot be watched: {exc}; attach again") from exc
        if there is None or there.host_id != host.host_id:
            self._lost = "stopped"
        self.check()

    def _kept(self, fd: int | None) -> int:
        """``fd``, closed with this object. Raises HostLost for the descriptor of a process that is gone."""
        if fd is None:
            self._lost = "died"
            self.check()
            return -1
        weakref.finalize(self, os.close, fd).atexit = False
        return fd

    @property
    def lost(self) -> bool:
        """Whether the memory cannot be trusted any more. Once True it stays so."""
        if not self._lost:
            self._lost = self._reason()
        return bool(self._lost)

    def check(self) -> None:
        """Raises HostLost."""
        if self.lost:
            raise HostLost(
                f"the host (pid {self._host.pid}) {self._lost}, and the memory it shared ({self._host.rung}) went with "
                "it: what was computed with these weights meanwhile is not to be trusted; attach again"
            )

    def revoke(self, reason: str) -> None:
        """The host does not count us any more, so it may free the memory at any time. ``reason``: "it ..."."""
        self._lost = self._lost or reason

    def _reason(self) -> str:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if poller.poll(0) or is_exiting(self._stat):
            return "died"
        return "" if os.pread(self._lock, len(self._published) + 1, 0) == self._published else "stopped"


class Guard:
    """A forward pre-hook that asks before each call of ``module``. ``check`` raises HostLost.

    It goes along into a deep copy of the module, which has weights of its own and is not asked for.
    """

    def __init__(self, module: object, check: Callable[[], None]) -> None:
        self._module = weakref.ref(module)
        self._check = check

    def __deepcopy__(self, memo: dict[int, object]) -> Guard:
        return self

    def __call__(self, module: object, args: object) -> None:
        if module is self._module():
            self._check()

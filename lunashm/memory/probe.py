"""Which rung works here: found out by a real round trip between two processes, never by reading version numbers.

``python -P -m lunashm.memory.probe`` is the other process: it opens what it is given and sends back what it reads. -P
keeps files of the working directory from being imported. Neither loads torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from lunashm.errors import LunashmError, SettingsError, SharedMemoryError, from_code
from lunashm.memory import CPU, ON_CPU, ON_GPU, Rung, Segment, cuda, open_handle, ram, rung_for
from lunashm.memory.posix import shm_total
from lunashm.protocol import Handle

TIMEOUT_S = 60.0
"""For the whole round trip. Two CUDA contexts take seconds on a machine that is busy."""

_SAMPLE = 4096
_NBYTES = (2 << 20) + _SAMPLE
"""More than one page of a GPU's memory, and not a multiple."""

_SMALL = 4
"""Below what part of the RAM tmpfs counts as small. Linux' own default is a half, Docker's 64 MB."""


class _Seen(msgspec.Struct, frozen=True):
    """What the other process read at both ends, or the error it met."""

    first: bytes = b""
    last: bytes = b""
    code: str = ""
    message: str = ""


@dataclass(frozen=True)
class Verdict:
    """``reason`` is empty where the rung works; ``tried`` is False for one that was not needed."""

    rung: str
    reason: str
    tried: bool = True
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        return self.tried and not self.reason

    def __str__(self) -> str:
        if self.works:
            return f"{self.rung} works (round trip in {self.seconds:.1f} s)"
        return f"{self.rung} {self.reason if not self.tried else 'does not work here: ' + self.reason}"


@dataclass(frozen=True)
class Choice:
    """The rung to serve with; ``verdicts`` on all that were looked at, in that order; ``note``: why in that order."""

    rung: Rung
    verdicts: tuple[Verdict, ...]
    note: str = ""

    @property
    def fallback(self) -> str:
        """Why it is not the one that is taken as a rule; empty where it is."""
        before = self.verdicts[: [verdict.works for verdict in self.verdicts].index(True)]
        reasons = [*([self.note] if self.note else []), *map(str, before)]
        if reasons and not self.rung.outlives_host:
            reasons.append("mind that a client's write reaches every client, and that the memory dies with the host")
        return "; ".join(reasons)


def choose(memory: str, device: str) -> Choice:
    """The rung called ``memory`` on ``device`` (``cpu`` or a GPU's UUID), or for ``auto`` the best that works.

    Raises SettingsError, with all reasons, where none does; WrongDevice for a GPU that is not there.
    """
    if memory not in ("auto", *(ON_CPU if device == CPU else ON_GPU)):
        raise SettingsError(_misplaced(memory, device))
    names, note = candidates(device) if memory == "auto" else ((memory,), "")
    verdicts: list[Verdict] = []
    for name in names:
        if any(verdict.works for verdict in verdicts):
            verdicts.append(Verdict(name, "was not tried: it comes after the one that is taken", tried=False))
        else:
            verdicts.append(probe(name, device))
    for verdict in verdicts:
        if verdict.works:
            return Choice(rung_for(verdict.rung, device), tuple(verdicts), note)
    reasons = "; ".join(map(str, verdicts))
    raise SettingsError(f"memory of {device} cannot be shared between processes: {reasons}")


def _misplaced(memory: str, device: str) -> str:
    """Why a rung of the other kind of device cannot be taken, and what to do."""
    if device == CPU:
        return f"memory {memory!r} is a GPU's, and the device is cpu: name one (--device cuda:0), or use --memory auto"
    return f"memory {memory!r} is the CPU's, and the device is {cuda.describe(device)}: use --memory auto"


def candidates(device: str) -> tuple[tuple[str, ...], str]:
    """The rungs that ``auto`` tries, in that order, and what is behind an order that is not the usual one."""
    if device != CPU:
        return ON_GPU, ""
    if shm_total() * _SMALL >= ram.total():
        return ON_CPU, ""
    room = f"{shm_total() / 1e9:.2f} of {ram.total() / 1e9:.0f} GB RAM"
    return ON_CPU[::-1], f"posix comes last here: /dev/shm may hold only {room}"


def probe(name: str, device: str) -> Verdict:
    """One round trip: allocate, write, freeze, export, open and read in another process. Leaves nothing behind."""
    started = time.monotonic()
    try:
        _round_trip(rung_for(name, device))
    except LunashmError as exc:
        return Verdict(name, exc.message + _suspicion(device), seconds=time.monotonic() - started)
    except OSError as exc:
        return Verdict(name, f"{exc}{_suspicion(device)}", seconds=time.monotonic() - started)
    return Verdict(name, "", seconds=time.monotonic() - started)


def _round_trip(rung: Rung) -> None:
    """Raises SharedMemoryError, or whatever one of the two processes met."""
    first, last = os.urandom(_SAMPLE), os.urandom(_SAMPLE)
    segment = rung.allocate(_NBYTES)
    try:
        segment.write(0, first)
        segment.write(_NBYTES - _SAMPLE, last)
        segment.freeze()
        seen = _ask_other(segment)
    finally:
        segment.free()
    if seen.code:
        raise from_code(seen.code, f"another process could not use it: {seen.message}")
    if (seen.first, seen.last) != (first, last):
        raise SharedMemoryError("another process that mapped it read other bytes than were written")


def _ask_other(segment: Segment) -> _Seen:
    handle, descriptor = segment.export(), segment.descriptor()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, contextlib.ExitStack() as stack:
        with theirs:
            command = [sys.executable, "-P", "-m", "lunashm.memory.probe", str(theirs.fileno())]
            child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        stack.callback(_end, child)
        ours.settimeout(TIMEOUT_S)
        try:
            socket.send_fds(ours, [msgspec.msgpack.encode(handle)], [] if descriptor is None else [descriptor])
            answer = ours.recv(1 << 16)
        except TimeoutError:
            raise SharedMemoryError(f"another process did not manage to map it within {TIMEOUT_S:g} s") from None
        except OSError as exc:
            answer = b""
            reason = str(exc)
        else:
            reason = "it said nothing"
        if not answer:
            code, errors = _last_words(child)
            last = errors.decode(errors="replace").strip().rpartition("\n")[2] or reason
            raise SharedMemoryError(f"another process that should map it ended with status {code}: {last}")
        return msgspec.msgpack.decode(answer, type=_Seen)


def _last_words(child: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """How it ended and what it wrote; it is ended if it does not by itself."""
    try:
        _, errors = child.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        _, errors = child.communicate()
    return child.returncode, errors


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def _suspicion(device: str) -> str:
    """What is known to keep processes from sharing a GPU's memory and is the case here: the driver's own words for it
    say little."""
    if device == CPU:
        return ""
    found = list(_suspects(device))
    return f" ({'; '.join(found)})" if found else ""


def _suspects(device: str) -> Iterable[str]:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/osrelease") as release:
        if "microsoft" in release.read().lower():
            yield "this is WSL2, which has no CUDA IPC"
    with contextlib.suppress(LunashmError):
        for gpu in cuda.devices():
            if gpu.uuid == device and gpu.mig:
                yield "this is a MIG instance: CUDA IPC does not work between GPU instances"
            if gpu.uuid == device and gpu.compute_mode == "exclusive-process":
                yield "its compute mode lets one process use it at a time: nvidia-smi -c DEFAULT"


def answer(fd: int) -> None:
    """The other process: map what comes through ``fd`` and send back both ends of it."""
    with socket.socket(fileno=fd) as channel:
        data, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 1)
        try:
            handle = msgspec.msgpack.decode(data, type=Handle)
            mapping = open_handle(handle, descriptors[0] if descriptors else None)
            ends = bytes(mapping.peek(0, _SAMPLE)), bytes(mapping.peek(handle.nbytes - _SAMPLE, _SAMPLE))
            del mapping
            seen = _Seen(*ends)
        except LunashmError as exc:
            seen = _Seen(code=exc.code, message=exc.message)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        channel.send(msgspec.msgpack.encode(seen))


if __name__ == "__main__":
    answer(int(sys.argv[1]))

"""A step's process, seen from outside: started, waited for no longer than it may take, and what is left of it ended.

A step that dies or hangs is recorded here. Touches no CUDA.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.gpu import record
from bench.gpu.part import Measured
from bench.root import ROOT

_MARK = "BENCH_GPU_STEP"
"""In the environment of all processes of a step; hosts have sessions of their own, but this they inherit."""
_TAIL = 4000


def run(place: record.Place, arguments: Sequence[str], environment: Mapping[str, str], limit_s: float) -> str:
    """The step's status; its record is there, and none of its processes."""
    place.path.unlink(missing_ok=True)
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "bench.gpu.step", str(place.part), place.step, "--out", str(place.out), *arguments]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, _MARK: mark}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process, mark)
        seconds = time.monotonic() - began
        log.seek(0)
        said = log.read()[-_TAIL:]
    found = place.read()
    if found is not None:  # it had done its work, however its process ended then
        return str(found["status"])
    if code is None:
        status, error = record.TIMEOUT, f"was not done after {limit_s:.0f} s and was ended"
    else:
        status, error = record.DIED, f"its process {_ended(code)} and left no result"
    place.write(Measured(), status, seconds, f"{error}; the end of what it said:\n{said}")
    return status


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """The process and all that it started, hosts and clients with sessions of their own included."""
    if process.poll() is None:
        process.kill()
        process.wait()
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    wanted, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found

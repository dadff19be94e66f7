"""One check: its result, and how it is run so that nothing it does can stop the others. Knows no machine.

A check that does not come back is a failed check; so is one that raises what nobody thought of.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lunashm.errors import LunashmError
from lunashm.memory import CPU
from lunashm.settings import Settings

LIMIT_S = 20.0
"""For one check, unless it says otherwise; what is looked at answers in milliseconds where it answers at all."""


class State(enum.Enum):
    """FAIL: lunashm does not work here as it is configured. SKIP: not looked at, for the reason given."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Check:
    """``fix`` says what to do, to be pasted where it is a command; only where something is to be done."""

    name: str
    state: State
    detail: str
    fix: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """What lunashm is to do on this machine. ``only``: nobody is interested in other devices than ``device``."""

    device: str = CPU
    memory: str = Settings().memory
    only: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != CPU

    def broken(self, on_gpu: bool) -> State:
        """How bad it is when what the CPU, or a GPU, needs is not there."""
        return State.FAIL if on_gpu == self.on_gpu else State.WARN


@dataclass(frozen=True)
class Task:
    """``look`` makes the check, within ``limit_s``."""

    name: str
    look: Callable[[], Check]
    limit_s: float = LIMIT_S


def run(tasks: Iterator[Task]) -> Iterator[Check]:
    """One after the other, each in a thread of its own: one that hangs is left behind."""
    while True:
        try:
            task = next(tasks)
        except StopIteration:
            return
        except Exception as exc:  # noqa: BLE001 - named in the result
            yield crashed("doctor", exc)
            return
        found: list[Check] = []
        worker = threading.Thread(target=_keep, args=(task, found), daemon=True)
        worker.start()
        worker.join(task.limit_s)
        yield found[0] if found else overdue(task.name, task.limit_s)


def _keep(task: Task, found: list[Check]) -> None:
    found.append(result(task))


def result(task: Task) -> Check:
    """The check, or that it failed in a way nobody thought of."""
    started = time.monotonic()
    try:
        check = task.look()
    except Exception as exc:  # noqa: BLE001 - named in the result
        check = crashed(task.name, exc)
    return dataclasses.replace(check, seconds=round(time.monotonic() - started, 3))


def crashed(name: str, exc: Exception) -> Check:
    """Errors of ours say what to do; of others nobody has thought."""
    kind = type(exc).__name__
    fix = "" if isinstance(exc, LunashmError) else f"please report it: {name}: {kind}"
    return Check(name, State.FAIL, str(exc) or kind, fix)


def overdue(name: str, limit_s: float) -> Check:
    text = f"no answer within {limit_s:g} s"
    return Check(name, State.FAIL, text, "see dmesg for what hangs; try again when the machine is idle", limit_s)

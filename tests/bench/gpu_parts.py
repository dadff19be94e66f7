"""Parts as the GPU suite runs them, for its tests: steps that go well, miss, fail, die, hang, or want too much time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from bench.gpu.part import Context, Measured, Part, Step
from bench.report import Figure


def note(context: Context, name: str) -> None:
    with open(context.scratch / "ran.txt", "a") as file:
        file.write(f"{name}\n")


def good(context: Context) -> Measured:
    note(context, "good")
    figures = [Figure("speed of the good", 4321.5, "GB/s", ">= 1")]
    return Measured(figures, {"speed, GB/s": [4321.5, 4321.5]}, {"a fact": "seen | so"}, ["a note"])


def misses(context: Context) -> Measured:
    note(context, "misses")
    return Measured([Figure("speed of the slow", 2.0, "GB/s", ">= 3")], {"slow, GB/s": [2.0]})


def mends(context: Context) -> Measured:
    """Fails until somebody has made the file ``mended``."""
    note(context, "mends")
    if not (context.scratch / "mended").exists():
        raise RuntimeError("not mended yet")
    return Measured()


def dies(context: Context) -> Measured:
    print("about to end", flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
    raise AssertionError


def hangs(context: Context) -> Measured:
    """With a process that has a session of its own, as hosts have."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    (context.scratch / "child.txt").write_text(str(child.pid))
    print("waiting for what never comes", flush=True)
    threading.Event().wait()
    raise AssertionError


PARTS = (
    Part(1, "well", "what goes well", (Step("good", good, 5), Step("large", good, 1000))),
    Part(2, "ill", "what does not", (Step("mends", mends, 5), Step("dies", dies, 5))),
    Part(3, "stuck", "what hangs", (Step("hangs", hangs, 1),)),
    Part(4, "slow", "what misses", (Step("misses", misses, 5),)),
    Part(5, "drawn", "what needs ComfyUI", (Step("draws", good, 5, needs_comfyui=True),)),
)

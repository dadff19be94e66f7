"""The machine that a run is about: its GPU's name, and the environment of the processes that meet its driver.

In a dry run the driver is the stand-in of tests/standin. Asked in other processes: this one touches no CUDA.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from bench.root import ROOT

_LOOK = "from lunashm.memory import cuda; print(cuda.devices()[0].name)"
LOOK_S = 120


class NoGpu(Exception):
    """There is no GPU that this Python can use; the message says why and what else there is."""


def environment(dry: bool) -> dict[str, str]:
    """Of the processes of a step. A clean one: what is measured does not depend on the caller's lunashm settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LUNASHM_")}
    if not dry:
        paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
        return kept | {"PYTHONPATH": os.pathsep.join(paths)}
    from tests.standin import build  # noqa: PLC0415 - a machine with a GPU needs no C compiler

    on_standin = build.environment(nvml=True)
    return {name: value for name, value in on_standin.items() if not name.startswith("LUNASHM_")}


def gpu_name(dry: bool) -> str:
    """Of the first GPU. Raises NoGpu."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOK], cwd=ROOT, env=environment(dry), capture_output=True, text=True,
        check=False, timeout=LOOK_S,
    )  # fmt: skip
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NoGpu(f"no GPU can be used here: {words}\nmake gpu DRY=1 runs every part at toy size without one")
    return done.stdout.strip()


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")

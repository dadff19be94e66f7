"""Part 1: the tests of ``tests/gpu`` on the real driver, and their outcomes as figures and facts.

In a dry run, where these have no GPU to run on, a few of the contract's own on the stand-in driver.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from bench.checkpoints import ROOT
from bench.gpu import allocators, attach, deaths, environment, nvml, violation
from bench.gpu.part import Context, Measured, Part, Step
from bench.gpu.step import StepFailed
from bench.report import Figure

_WHOLE = ["tests/gpu"]
_DRY = ["tests/contracts/test_memory_contract.py", "tests/gpu/test_torch.py", "-k", "cuda and (frozen or mapped)"]
_LAST_LINES = 15


def run(context: Context) -> Measured:
    """Raises StepFailed where pytest is missing, or where nothing ran."""
    if importlib.util.find_spec("pytest") is None:
        raise StepFailed("the contract suite needs pytest: carry pytest and pytest-timeout, see bench/gpu/README.md")
    with tempfile.TemporaryDirectory(prefix="lunashm-gpu-") as folder:
        junit = Path(folder) / "junit.xml"
        chosen = _DRY if context.dry else _WHOLE
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *chosen]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
        if not junit.exists():
            said = (done.stdout + done.stderr)[-3000:]
            raise StepFailed(f"pytest ended with {done.returncode} and no report:\n{said}")
        found = read(junit)
    if not found.samples["passed, s"] and not found.facts["failures"]:
        raise StepFailed(f"no test ran; skipped: {found.facts['skipped']}\n{done.stdout[-2000:]}")
    return found


def read(junit: Path) -> Measured:
    """What pytest's report says: counts, each failure with its last lines, and what tests recorded."""
    passed: list[float] = []
    failures: dict[str, str] = {}
    skipped: dict[str, int] = {}
    recorded: dict[str, str] = {}
    for case in ET.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if problem is not None:
            failures[name] = "\n".join((problem.text or problem.get("message") or "").splitlines()[-_LAST_LINES:])
        elif skip is not None:
            reason = skip.get("message") or "no reason"
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed.append(float(case.get("time") or 0))
        for one in case.iter("property"):
            if one.get("name") != "tier":
                recorded[str(one.get("name"))] = str(one.get("value"))
    figures = [
        Figure("tests on the real driver: passed", len(passed), "tests"),
        Figure("tests on the real driver: failed", len(failures), "tests", "<= 0"),
        Figure("tests on the real driver: skipped", sum(skipped.values()), "tests"),
    ]
    facts = {"failures": failures, "skipped": skipped, **recorded}
    return Measured(figures, {"passed, s": passed}, facts)


PART = Part(
    1, "contract", "the contract on a real driver, and facts that only it knows",
    (
        Step("environment", environment.run, 15),
        Step("contract", run, 180),
        Step("deaths", deaths.run, 40),
        Step("violation", violation.run, 40),
        Step("attach", attach.run, 90),
        Step("allocators", allocators.run, 60),
        Step("nvml", nvml.run, 40),
    ),
)  # fmt: skip

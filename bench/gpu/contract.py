"""Part 1: the tests of ``tests/gpu`` on the real driver, and their outcomes as figures and facts.

In a dry run, where these have no GPU to run on, a few of the contract's own on the stand-in driver.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from bench.gpu import allocators, attach, deaths, environment, nvml, violation
from bench.gpu.part import Context, Measured, Part, Step
from bench.gpu.step import StepFailed
from bench.report import Figure
from bench.root import ROOT

_CONTRACT = ["tests/gpu/test_contract.py"]
_TORCH = ["tests/gpu/test_torch.py", "tests/gpu/test_others.py", "tests/gpu/test_attach.py"]
_DRY = ["tests/contracts/test_memory_contract.py", "-k", "cuda and written"]
_LAST_LINES = 15


def contract(context: Context) -> Measured:
    return _run(_DRY if context.dry else _CONTRACT, context)


def with_torch(context: Context) -> Measured:
    """In a dry run they are only collected, and skip with their reason."""
    return _run(_TORCH, context)


def _run(chosen: list[str], context: Context) -> Measured:
    """Raises StepFailed where pytest is missing, or where nothing ran."""
    if importlib.util.find_spec("pytest") is None:
        raise StepFailed("the contract suite needs pytest: carry pytest and pytest-timeout, see bench/gpu/README.md")
    with tempfile.TemporaryDirectory(prefix="lunashm-gpu-") as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={junit}", *chosen]
        log = context.scratch / f"pytest-{chosen[0].rpartition('/')[2]}.txt"
        with open(log, "w") as said:  # a file: it is there, too, when the step takes too long and is ended
            done = subprocess.run(command, cwd=ROOT, stdout=said, stderr=said, check=False)
        if not junit.exists():
            raise StepFailed(f"pytest ended with {done.returncode} and no report:\n{log.read_text()[-3000:]}")
        found = read(junit)
    if not context.dry and not found.samples["passed, s"] and not found.facts["failures"]:
        raise StepFailed(f"no test ran; skipped: {found.facts['skipped']}\n{log.read_text()[-2000:]}")
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
        Step("contract", contract, 75),
        Step("deaths", deaths.run, 35),
        Step("violation", violation.run, 30),
        Step("attach", attach.run, 85),
        Step("nvml", nvml.run, 35),
        Step("allocators", allocators.run, 40),
        Step("torch", with_torch, 150),
    ),
)  # fmt: skip

"""What a run leaves behind: one JSON file in the benchmarks' common form, and a page that can be quoted.

Owns their names and form; measures nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.acceptance.findings import FAIL, PASS, Findings
from bench.acceptance.scale import Scale
from bench.report import Report, lists_on_one_line

VERDICTS = {None: "", True: "yes", False: "**no**"}
_LONGEST = 400


def of(found: Sequence[Findings], scale: Scale, device: str, comfy: Path) -> dict[str, Any]:
    """The whole run; `tests` in the order of their numbers."""
    tests = sorted(found, key=lambda one: one.test)
    report = Report.of(
        "acceptance" + ("-short" if scale.short else ""),
        [figure for one in tests for figure in one.figures],
        {name: values for one in tests for name, values in one.samples.items()},
        comfy=comfy,
    )
    own = {"device": device, "passed": all(one.passed for one in tests), "tests": [one.as_dict() for one in tests]}
    return report.as_dict() | own


def text(record: dict[str, Any]) -> str:
    return lists_on_one_line(json.dumps(record, indent=2, default=str))


def write(record: dict[str, Any], out: Path) -> Path:
    """Both files; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{record['benchmark']}-{re.sub('[^0-9T]', '', record['date'].partition('+')[0])}"
    (out / f"{stem}.json").write_text(text(record) + "\n")
    page = out / f"{stem}.md"
    page.write_text(_page(record, stem))
    return page


def _page(record: dict[str, Any], stem: str) -> str:
    tests, hardware = record["tests"], record["hardware"]
    passed = sum(test["status"] == PASS for test in tests)
    ram = f"{hardware['ram'] / 2**30:.0f} GiB RAM"
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    lines = [
        f"# {record['benchmark']}: {passed} of {len(tests)} passed", "",
        f"{hardware['cpu']}, {hardware['cores']} cores, {ram}, {gpus}, Linux {hardware['kernel']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f"; host on {record['device']}.", "",
        f"`{record['command']}`, {record['date']}; load average {hardware['load_1m']:.1f} at the end; all of it: "
        f"[{stem}.json]({stem}.json)", "",
        "| test | | s | |", "|---|---|---|---|",
    ]  # fmt: skip
    for test in tests:
        words = test["line"].partition(f" {test['status']} ")[2]
        status = "pass" if test["status"] == PASS else "**FAIL**"
        lines.append(f"| {test['test']} | {status} | {test['seconds']:.0f} | {_cell(words)} |")
    for test in tests:
        lines += ["", *_section(test, record)]
    return "\n".join(lines) + "\n"


def _section(test: dict[str, Any], record: dict[str, Any]) -> list[str]:
    lines = [f"## {test['test']}: {test['title']}", ""]
    if test["status"] == FAIL and test["error"]:
        lines += ["```", test["error"][-2000:], "```", ""]
    lines += [f"- {'' if claim['holds'] else '**not so:** '}{_claim(claim)}" for claim in test["claims"]]
    own = [figure for figure in record["figures"] if figure["figure"].startswith(f"{test['test']}: ")]
    if own:
        lines += ["", "| figure | value | unit | target | met |", "|---|---|---|---|---|"]
    for figure in own:
        value = "not measured" if figure["value"] is None else f"{figure['value']:.4g}"
        name, target = figure["figure"].partition(": ")[2], figure["target"] or ""
        lines.append(f"| {name} | {value} | {figure['unit']} | {target} | {VERDICTS[figure['met']]} |")
    return lines


def _claim(claim: dict[str, Any]) -> str:
    """What speaks for it is left out where it is long: the JSON has it whole."""
    seen = claim["seen"] if len(claim["seen"]) <= _LONGEST else claim["seen"][: _LONGEST - 4] + " ..."
    return f"{claim['what']} ({seen})" if seen else claim["what"]


def _cell(words: str) -> str:
    return words.replace("|", "\\|")

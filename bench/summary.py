"""A folder of saved reports as one readable table: README.md, next to them.

Takes the newest report of each benchmark; measures nothing.

    python -m bench.summary bench/results/NAME
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ORDER = ("vram", "images", "first_prompt", "attach", "load", "loading", "idle", "lora", "lora_rule")
VERDICTS = {None: "", True: "yes", False: "**no**"}
SAVED = re.compile(r"(.+)-\d{8}T\d{6}\.json")


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """The last report of each benchmark, in ORDER, others after it. Names carry the date, so they sort by it."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        matched = SAVED.fullmatch(file.name)
        if matched:
            found[matched[1]] = json.loads(file.read_text()) | {"stem": file.stem}
    ranks = {name: rank for rank, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: ranks.get(item[0], len(ORDER))))


def text(folder: Path) -> str:
    reports = newest(folder)
    if not reports:
        raise SystemExit(f"no saved report in {folder}")
    lines = [f"# {folder.name}", "", *_place(reports), ""]
    missed = [
        f"{name}: {figure['figure']}"
        for name, report in reports.items()
        for figure in report["figures"]
        if figure["met"] is False
    ]
    with_target = sum(figure["met"] is not None for report in reports.values() for figure in report["figures"])
    lines += [f"{with_target - len(missed)} of {with_target} targets are met.", ""]
    lines += [f"- missed: {line}" for line in missed] + [""] * bool(missed)
    for name, report in reports.items():
        lines += [*_section(name, report, folder), ""]
    return "\n".join(lines)


def _place(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Hardware and versions, of all reports together: they may differ in which they know."""
    versions: dict[str, str] = {}
    for report in reports.values():
        versions |= report["versions"]
    hardware = next(iter(reports.values()))["hardware"]
    ram, shm = (f"{hardware[key] / 2**30:.0f} GiB" for key in ("ram", "dev_shm"))
    size = f"{hardware['cores']} cores, {ram} RAM, {shm} /dev/shm"
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    return [
        f"{hardware['cpu']}, {size}, {gpus}, Linux {hardware['kernel']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    ]


def _section(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    load = report["hardware"].get("load_1m")
    busy = f"; load average {load:.1f} at the end" if load is not None else ""
    raw = f"{report['stem']}.json"
    lines = [f"## {name}", "", f"`{report['command']}`, {report['date']}{busy}; raw: [{raw}]({raw})"]
    lines += ["", "| figure | value | unit | target | met |", "|---|---|---|---|---|"]
    for figure in report["figures"]:
        value = "not measured" if figure["value"] is None else f"{figure['value']:.4g}"
        target, met = figure["target"] or "", VERDICTS[figure["met"]]
        lines.append(f"| {figure['figure']} | {value} | {figure['unit']} | {target} | {met} |")
    spreads = {key: s for key, s in report["spread"].items() if s["n"] > 1}
    if spreads:
        lines += ["", "| samples | n | min | q1 | median | q3 | max |", "|---|---|---|---|---|---|---|"]
    for key, s in spreads.items():
        values = " | ".join(f"{s[part]:.4g}" for part in ("min", "q1", "median", "q3", "max"))
        lines.append(f"| {key} | {s['n']} | {values} |")
    lines += [f"\nNote: {note}" for note in report["notes"]]
    if (folder / f"{report['stem']}.png").exists():
        lines += ["", f"![{name}]({report['stem']}.png)"]
    return lines


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.summary", description=about)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    (folder / "README.md").write_text(text(folder))
    print(folder / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The folder's README.md: what all records in it say together. Measures nothing.

Of a dry run it says what ran and how often, and no value at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.part import Part, Step
from bench.gpu.record import DRY_RUN, OK, Place

VERDICTS = {None: "", True: "yes", False: "**no**"}
_LONG = 1200


@dataclass
class Found:
    """``missed``: the figures that miss their target."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def write(
    out: Path, parts: Sequence[Part], name: str, dry: bool, open_steps: Mapping[str, str], notes: Sequence[str] = ()
) -> Found:
    """Of every record in ``out``, those of earlier calls included."""
    found = Found()
    records = [
        (part, step, Place(out, part.number, step.name, dry, "").read()) for part in parts for step in part.steps
    ]
    there = [record for _, _, record in records if record is not None]
    body = Found()
    for part in parts:
        _part(body, part, [(step, record) for of, step, record in records if of is part], out, open_steps)
    found.missed = body.missed
    if dry:
        found.lines += [f"**{DRY_RUN}.**", ""]
    found.lines += [f"# {out.name}", "", *_place(name, there, dry), ""]
    if not dry:
        with_target = sum(figure["met"] is not None for record in there for figure in record["figures"])
        found.lines += [f"{with_target - len(found.missed)} of {with_target} targets are met.", ""]
        found.lines += [f"- missed: {line}" for line in found.missed] + [""] * bool(found.missed)
    found.lines += [f"Note: {note}\n" for note in notes] + body.lines
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text("\n".join(found.lines).rstrip() + "\n")
    return found


def _place(name: str, records: Sequence[dict[str, Any]], dry: bool) -> list[str]:
    """Hardware and versions, of all records together."""
    lines = [f"Device: {name}" + (" (no GPU)" if dry else "")]
    if not records:
        return [*lines, "", "Nothing has run yet."]
    versions: dict[str, str] = {}
    for record in records:
        versions |= record["versions"]
    hardware = records[-1]["hardware"]
    ram, shm = (f"{hardware[key] / 2**30:.0f} GiB" for key in ("ram", "dev_shm"))
    gpus = ", ".join(hardware["gpus"]) or "none that nvidia-smi shows"
    codes = sorted({record["code"] for record in records})
    return [
        *lines, "",
        f"{hardware['cpu']}, {hardware['cores']} cores, {ram} RAM, {shm} /dev/shm, Linux {hardware['kernel']}; "
        f"GPUs with memory and driver: {gpus}.", "",
        ", ".join(f"{key} {value}" for key, value in versions.items()) + f"; sources {', '.join(codes)}.",
    ]  # fmt: skip


def _part(
    found: Found, part: Part, steps: Sequence[tuple[Step, dict[str, Any] | None]], out: Path,
    open_steps: Mapping[str, str],
) -> None:  # fmt: skip
    found.lines += [f"## Part {part.number}: {part.title}", ""]
    picture = out / f"part{part.number}.png"
    if picture.exists():
        found.lines += [f"![part {part.number}]({picture.name})", ""]
    for step, record in steps:
        _step(found, step, record, open_steps.get(f"{part.number} {step.name}", ""), part)


def _step(found: Found, step: Step, record: dict[str, Any] | None, why: str, part: Part) -> None:
    found.lines += [f"### {step.name}", ""]
    if record is None:
        found.lines += [f"Missing: {why or 'has not run'}.", ""]
        return
    name = f"part{part.number}-{step.name}.json"
    found.lines += [f"{record['status']}, {record['seconds']:.0f} s, {record['date']}; all of it: [{name}]({name})", ""]
    if record["status"] != OK:
        found.lines += [f"Missing, it {record['status']}:", "", "```", record["error"].strip()[-2000:], "```", ""]
        return
    if record["dry"]:
        series = sum(len(values) for values in record["samples"].values())
        found.lines += [f"ran: {len(record['figures'])} figures of {series} samples, {len(record['facts'])} facts", ""]
    else:
        found.missed += [f"{step.name}: {figure['figure']}" for figure in record["figures"] if figure["met"] is False]
        found.lines += _figures(record) + _facts(record["facts"])
    found.lines += [f"Note: {note}\n" for note in record["notes"]]


def _figures(record: dict[str, Any]) -> list[str]:
    if not record["figures"]:
        return []
    lines = ["| figure | value | unit | target | met |", "|---|---|---|---|---|"]
    for figure in record["figures"]:
        value = "not measured" if figure["value"] is None else f"{figure['value']:.4g}"
        target = figure["target"] or ""
        lines.append(f"| {figure['figure']} | {value} | {figure['unit']} | {target} | {VERDICTS[figure['met']]} |")
    spreads = {key: s for key, s in record["spread"].items() if s["n"] > 1}
    if spreads:
        lines += ["", "| samples | n | min | q1 | median | q3 | max |", "|---|---|---|---|---|---|---|"]
    for key, s in spreads.items():
        values = " | ".join(f"{s[part]:.4g}" for part in ("min", "q1", "median", "q3", "max"))
        lines.append(f"| {key} | {s['n']} | {values} |")
    return [*lines, ""]


def _facts(facts: Mapping[str, Any]) -> list[str]:
    """Long ones are cut: the record has them whole."""
    if not facts:
        return []
    lines = ["| fact | |", "|---|---|"]
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        text = text if len(text) <= _LONG else f"{text[:_LONG]} ..."
        lines.append(f"| {_cell(name)} | {_cell(text)} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

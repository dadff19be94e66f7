"""One step in a process of its own: ``python -m bench.gpu.step PART STEP --out DIR``. Leaves its record.

What it cannot leave a record of (an end by a signal, no end at all), ``child.py`` does, which started it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import record, sources
from bench.gpu.part import Context, Measured, Part, Step

REGISTRY = "bench.gpu.registry"


class StepFailed(Exception):
    """A step cannot go on, for a reason that is known; the message says what is missing and what to do."""


def parts_of(registry: str) -> tuple[Part, ...]:
    """``registry``: the module that has PARTS."""
    found: tuple[Part, ...] = importlib.import_module(registry).PARTS
    return found


def find(parts: Sequence[Part], part: int, step: str) -> Step:
    steps = {(each.number, one.name): one for each in parts for one in each.steps}
    if (part, step) not in steps:
        known = ", ".join(f"{number} {name}" for number, name in steps)
        raise SystemExit(f"there is no step {part} {step}; there are {known}")
    return steps[part, step]


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.step", description=about)
    parser.add_argument("part", type=int)
    parser.add_argument("step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--registry", default=REGISTRY, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    place = record.Place(args.out, args.part, args.step, args.dry, sources.digest())
    context = Context(args.device, args.dry, args.scratch, args.comfyui)
    began = time.monotonic()
    try:
        measured = find(parts_of(args.registry), args.part, args.step).run(context)
    except StepFailed as exc:
        return _failed(place, began, str(exc))
    except Exception:  # noqa: BLE001 - whatever it is, the record says it
        return _failed(place, began, traceback.format_exc())
    place.write(measured, record.OK, time.monotonic() - began)
    return 0


def _failed(place: record.Place, began: float, error: str) -> int:
    place.write(Measured(), record.FAILED, time.monotonic() - began, error)
    print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

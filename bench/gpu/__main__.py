"""Everything that only a GPU can tell, by one command: ``make gpu``, or ``python -m bench.gpu``.

Runs the steps that are not finished, each in a process of its own, and leaves their records, README.md and a picture
of each part in one folder. Called again it goes on where it stopped. ``--dry`` runs all of it at toy size, without a
GPU.

    python -m bench.gpu --parts 1,2
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import chart, machine, page, suite
from bench.gpu.part import Part
from bench.gpu.step import REGISTRY, parts_of
from bench.gpu.suite import PART_LIMIT_S, Run
from bench.root import ROOT

RESULTS = ROOT / "bench" / "results"
ALL_MET, MISSED, OPEN = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    parts = _chosen(parts_of(args.registry), args.parts)
    if args.list:
        return _list(parts)
    try:
        name = machine.gpu_name(args.dry)
    except machine.NoGpu as exc:
        print(exc, file=sys.stderr)
        return OPEN
    out = _out(args.out, args.dry, name)
    run = Run(
        parts=parts, out=out, scratch=_scratch(args.scratch, out, args.dry), dry=args.dry, fresh=args.fresh,
        keep=args.keep, limit_s=args.time_limit, device=args.device, registry=args.registry,
        comfyui=args.comfyui.expanduser().resolve() if args.comfyui else None,
    )  # fmt: skip
    print(f"results: {out}" + (" (DRY RUN)" if args.dry else ""), file=sys.stderr)
    try:
        open_steps = suite.run(run)
    except KeyboardInterrupt:
        open_steps = {"the rest": "interrupted"}
    every = parts_of(args.registry)
    notes = chart.draw(out, every, args.dry)
    found = page.write(out, every, name, args.dry, open_steps, notes)
    return _last_line(run, open_steps, found.missed)


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=about)
    parser.add_argument("--parts", metavar="1,2", help="these parts only (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/GPU-DATE; dry: a new folder")
    parser.add_argument("--dry", action="store_true", help="toy sizes, no GPU: nothing that comes of it is a figure")
    parser.add_argument("--fresh", action="store_true", help="run finished steps again")
    parser.add_argument("--keep", action="store_true", help="finished steps stay so, though the code has changed")
    parser.add_argument(
        "--time-limit", type=float, default=PART_LIMIT_S, metavar="S", help=f"for each part (default: {PART_LIMIT_S:g})"
    )
    parser.add_argument("--list", action="store_true", help="say which steps there are, and run none")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for checkpoints, some 30 GB (default: cache)")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="a ComfyUI checkout, for the parts that draw")
    parser.add_argument("--device", default="cuda:0", help="default: cuda:0")
    parser.add_argument("--registry", default=REGISTRY, help=argparse.SUPPRESS)
    return parser


def _chosen(parts: Sequence[Part], numbers: str | None) -> tuple[Part, ...]:
    if not numbers:
        return tuple(parts)
    wanted = {number.strip() for number in numbers.split(",")}
    unknown = wanted - {str(part.number) for part in parts}
    if unknown:
        known = ", ".join(f"{part.number} ({part.name})" for part in parts)
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}; there are {known}")
    return tuple(part for part in parts if str(part.number) in wanted)


def _list(parts: Sequence[Part]) -> int:
    for part in parts:
        print(f"{part.number} {part.name}: {part.title}, {sum(step.expected_s for step in part.steps):.0f} s")
        for step in part.steps:
            print(f"    {step.name}: {step.expected_s:.0f} s" + (", needs ComfyUI" if step.needs_comfyui else ""))
    return ALL_MET


def _out(named: Path | None, dry: bool, name: str) -> Path:
    """A dry run's results never lie where those of GPUs do."""
    if named is None and dry:
        return Path(tempfile.mkdtemp(prefix="lunashm-gpu-DRY-RUN-"))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    out = (named.expanduser() if named else RESULTS / f"{machine.slug(name)}-{date}").resolve()
    if dry and out.is_relative_to(RESULTS):
        raise SystemExit(f"{out} is for what a GPU has shown, and this is a dry run; name another folder (--out DIR)")
    return out


def _scratch(named: Path | None, out: Path, dry: bool) -> Path:
    from bench.workload import models_folder  # noqa: PLC0415 - --list needs none of it

    found = named or (out / "scratch" if dry else models_folder().parent / "gpu")
    found.mkdir(parents=True, exist_ok=True)
    return found.expanduser().resolve()


def _last_line(run: Run, open_steps: dict[str, str], missed: Sequence[str]) -> int:
    if open_steps:
        again = shlex.join(["python", "-m", "bench.gpu", "--out", str(run.out), *(["--dry"] if run.dry else [])])
        print(f"open: {', '.join(f'{name} ({why})' for name, why in open_steps.items())}; go on with: {again}")
        return OPEN
    if run.dry:
        print(f"DRY RUN: every step ran; nothing in {run.out} is a figure of a GPU")
        return ALL_MET
    if missed:
        print(f"every step ran; missed: {', '.join(missed)}; see {run.out / 'README.md'}")
        return MISSED
    print(f"every step ran, every target is met: {run.out / 'README.md'}")
    return ALL_MET


if __name__ == "__main__":
    sys.exit(main())

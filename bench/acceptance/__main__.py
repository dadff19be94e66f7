"""The user's eight tests on real ComfyUI servers: ``make acceptance``, or ``python -m bench.acceptance``.

Prints one line a test as it ends, and leaves JSON and a page in a folder. On the machine's first GPU where there is one
that can be used, else on the CPU. Exit status: 0 all passed, 1 one did not.

    python -m bench.acceptance --short --only T3,T5
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from bench import checkpoints
from bench.acceptance import record
from bench.acceptance.findings import Findings, attempt
from bench.acceptance.registry import BY_NAME, ORDER, TESTS
from bench.acceptance.scale import Scale, scale_of
from bench.acceptance.stage import Stage
from bench.gpu import machine
from bench.root import ROOT

RESULTS = ROOT / "bench" / "results"
KEPT = ("LUNASHM_COMFYUI", "LUNASHM_BENCH_MODELS")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    comfy = checkpoints.comfy_root(args.comfyui)
    device, name = _device(args.device)
    scale = scale_of(device, args.short)
    with tempfile.TemporaryDirectory(prefix="lunashm-acceptance-") as folder:
        _isolate(Path(folder))
        found = run(args.only, scale, comfy, device, Path(folder), sys.stderr if args.json else sys.stdout)
    made = record.of(found, scale, device, comfy)
    page = record.write(made, args.out or _folder(name))
    if args.json:
        print(record.text(made))
    failed = [one.test for one in found if not one.passed]
    words = f"failed: {', '.join(sorted(failed))}" if failed else f"all {len(found)} passed"
    print(f"{words}; {page}", file=sys.stderr)
    return 1 if failed else 0


def run(only: Sequence[str], scale: Scale, comfy: Path, device: str, folder: Path, out: TextIO) -> list[Findings]:
    """Each of the tests that were asked for; its line is printed to ``out`` when it ends."""
    every = []
    with Stage(scale, comfy, device, folder) as stage:
        for name in (name for name in ORDER if name in only):
            test = BY_NAME[name]
            found, began = Findings(test.name, test.title), time.monotonic()
            attempt(found, functools.partial(test.run, stage, found))
            found.seconds = time.monotonic() - began
            print(found, file=out, flush=True)
            every.append(found)
    return every


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n")[0]
    titles = "; ".join(f"{test.name} {test.title}" for test in TESTS)
    parser = argparse.ArgumentParser(prog="python -m bench.acceptance", description=about, epilog=titles)
    parser.add_argument("--short", action="store_true", help="few renders of a tiny model: shows that all is well")
    parser.add_argument("--only", type=_names, default=[test.name for test in TESTS], metavar="T3,T5")
    parser.add_argument("--comfyui", metavar="PATH", help="a checkout (default: $LUNASHM_COMFYUI, else ~/ComfyUI)")
    parser.add_argument("--device", metavar="D", help="cpu or cuda:N (default: the first GPU, else cpu)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/MACHINE-DATE")
    parser.add_argument("--json", action="store_true", help="print the record, and the lines to stderr")
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip().upper() for name in text.split(",")]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return names


def _device(named: str | None) -> tuple[str, str]:
    """The host's device, and what the machine is called in the results' folder."""
    cores = len(os.sched_getaffinity(0))
    if named != "cpu":
        try:
            return named or "cuda:0", machine.slug(machine.gpu_name(dry=False))
        except machine.NoGpu as exc:
            if named is not None:
                raise SystemExit(str(exc)) from exc
    return "cpu", f"cpu-{cores}core"


def _folder(name: str) -> Path:
    return RESULTS / f"{name}-{datetime.datetime.now(datetime.UTC).date().isoformat()}"


def _isolate(folder: Path) -> None:
    """No setting of the user's reaches what is tested."""
    for name in [name for name in os.environ if name.startswith("LUNASHM_") and name not in KEPT]:
        del os.environ[name]
    empty = folder / "lunashm.toml"
    empty.touch()
    os.environ["LUNASHM_CONFIG"] = str(empty)


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark, one after the other, into one folder of results.

    python -m bench.all --save bench/results/NAME [--only attach,load]

Ends with status 1 if a target was missed, 2 if a benchmark failed; the others still run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench import summary
from bench.checkpoints import ROOT

MISSED, FAILED = 1, 2


def run(name: str, folder: Path) -> int:
    """0: all targets met, MISSED, or FAILED; a benchmark that failed left no new report."""
    before = set(folder.glob(f"{name}-*.json"))
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", "--save", str(folder)], cwd=ROOT, check=False)
    if done.returncode and set(folder.glob(f"{name}-*.json")) == before:
        print(f"bench.{name} failed (exit {done.returncode})", file=sys.stderr)
        return FAILED
    return MISSED if done.returncode else 0


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.all", description=about)
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="where the reports go")
    parser.add_argument("--only", metavar="NAME,NAME", help=f"default: {','.join(summary.ORDER)}")
    args = parser.parse_args(argv)
    folder = args.save.absolute()
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder  # what the reports will show
    os.chdir(ROOT)
    folder.mkdir(parents=True, exist_ok=True)
    names = args.only.split(",") if args.only else summary.ORDER
    worst = max(run(name, folder) for name in names)
    if any(folder.glob("*.json")):
        (folder / "README.md").write_text(summary.text(folder))
    return worst


if __name__ == "__main__":
    sys.exit(main())

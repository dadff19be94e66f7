"""A fresh ComfyUI's first prompt: with a warm host against stock.

Pairs of one stock and one shared server, each freshly started, in alternating order; one host serves them all and has
the model loaded before the first pair. Measured is the wall time from POST /prompt to the finished result; starting the
server is not in it. The file is read through before every prompt, so that stock loads from the page cache.

    python -m bench.first_prompt --pairs 5 --arch sd15 --dtype fp32
"""

from __future__ import annotations

import argparse
import sys
import time

from bench import workload
from bench.host import HostProcess
from bench.report import Figure, Report, add_arguments, emit, median
from bench.workload import Workload


def first_prompt(work: Workload, host: HostProcess | None) -> tuple[float, bytes]:
    """Seconds from POST to result on a fresh server, and the image."""
    with work.server(host) as server:
        work.warm()
        began = time.monotonic()
        entry = server.run(work.graph)
        return time.monotonic() - began, server.image(entry)


def run(work: Workload, pairs: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each kind, pair by pair, and the share of images equal to the first stock one."""
    took_s: dict[str, list[float]] = {"stock": [], "shared": []}
    images: dict[str, list[bytes]] = {"stock": [], "shared": []}
    with work.host() as host:
        first_prompt(work, host)  # the host loads the model, in the dtypes this ComfyUI wants
        for index in range(pairs):
            for kind in ("stock", "shared") if index % 2 == 0 else ("shared", "stock"):
                seconds, image = first_prompt(work, host if kind == "shared" else None)
                took_s[kind].append(seconds)
                images[kind].append(image)
                print(f"pair {index + 1}, {kind}: {seconds:.2f} s", file=sys.stderr)
    everyone = images["stock"] + images["shared"]
    return took_s, sum(image == everyone[0] for image in everyone) / len(everyone)


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.first_prompt", description=about)
    parser.add_argument("--pairs", type=int, default=5, help="default: 5")
    workload.add_arguments(parser, arch="sd15", dtype="fp32")
    add_arguments(parser)
    args = parser.parse_args(argv)
    work = workload.from_arguments(args)
    took_s, identical = run(work, args.pairs)
    ratios = [shared / stock for shared, stock in zip(took_s["shared"], took_s["stock"], strict=True)]
    figures = [
        Figure("first prompt, warm host / stock, median of pairs", median(ratios), "ratio", "<= 0.5"),
        Figure("first prompt, stock, median", median(took_s["stock"]), "s"),
        Figure("first prompt, warm host, median", median(took_s["shared"]), "s"),
        Figure("images byte-identical to stock's", identical, "share", ">= 1"),
    ]
    samples = {"stock, s": took_s["stock"], "warm host, s": took_s["shared"], "warm host / stock": ratios}
    return 0 if emit(Report.of("first_prompt", figures, samples, comfy=work.comfy), args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())

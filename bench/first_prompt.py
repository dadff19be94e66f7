"""A fresh ComfyUI's first prompt: with a warm host against stock.

Pairs of one stock and one shared server, each freshly started, in alternating order; one host serves them all and has
the model loaded before the first pair. Measured is the wall time from POST /prompt to the finished result; starting the
server is not in it. The file is read through before every first prompt, so that stock loads from the page cache. A
second prompt on the same server, which loads nothing, shows how much of the first was sampling.

A pair counts when nobody else used more than a quarter of a core during its first prompts. There are more pairs, up to
three times as many, until enough count; if fewer than three do in the end, all count. The samples hold every pair.

    python -m bench.first_prompt --pairs 5 --arch sd15 --dtype fp32
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from bench import workload
from bench.host import HostProcess
from bench.quiet import QUIET_CORES, Stopwatch
from bench.report import Figure, Report, add_arguments, emit, median
from bench.workflows import again
from bench.workload import Workload

ENOUGH = 3


@dataclass(frozen=True)
class Prompts:
    """Seconds of a fresh server's first and second prompt, cores that others used during the first, the image."""

    first_s: float
    second_s: float
    others: float
    image: bytes


@dataclass(frozen=True)
class Pair:
    stock: Prompts
    shared: Prompts

    @property
    def ratio(self) -> float:
        return self.shared.first_s / self.stock.first_s

    @property
    def quiet(self) -> bool:
        return max(self.stock.others, self.shared.others) <= QUIET_CORES


def two_prompts(work: Workload, host: HostProcess | None) -> Prompts:
    with work.server(host) as server:
        work.warm()
        pids = [server.pid, *([host.pid] if host else [])]
        watch = Stopwatch(pids)
        entry = server.run(work.graph)
        first_s, others = watch.read()
        watch = Stopwatch(pids)
        server.run(again(work.graph, 1))
        prompts = Prompts(first_s, watch.read()[0], others, server.image(entry))
    name = "shared" if host else "stock"
    print(f"{name}: {first_s:.2f} s, then {prompts.second_s:.2f} s; others used {others:.2f} cores", file=sys.stderr)
    return prompts


def run(work: Workload, wanted: int) -> list[Pair]:
    pairs: list[Pair] = []
    with work.host() as host:
        two_prompts(work, host)  # the host loads the model, in the dtypes this ComfyUI wants
        while sum(pair.quiet for pair in pairs) < wanted and len(pairs) < 3 * wanted:
            if len(pairs) % 2 == 0:
                stock = two_prompts(work, None)
                shared = two_prompts(work, host)
            else:
                shared = two_prompts(work, host)
                stock = two_prompts(work, None)
            pairs.append(Pair(stock, shared))
    return pairs


def report(work: Workload, pairs: list[Pair]) -> Report:
    quiet = [pair for pair in pairs if pair.quiet]
    counted = quiet if len(quiet) >= ENOUGH else pairs
    everyone = [image for pair in pairs for image in (pair.stock.image, pair.shared.image)]
    identical = sum(image == everyone[0] for image in everyone) / len(everyone)
    ratio = _median(pair.ratio for pair in counted)
    figures = [
        Figure("first prompt, warm host / stock, median of pairs", ratio, "ratio", "<= 0.5"),
        Figure("first prompt, stock, median", _median(pair.stock.first_s for pair in counted), "s"),
        Figure("first prompt, warm host, median", _median(pair.shared.first_s for pair in counted), "s"),
        Figure("second prompt, stock, median", _median(pair.stock.second_s for pair in counted), "s"),
        Figure("second prompt, warm host, median", _median(pair.shared.second_s for pair in counted), "s"),
        Figure("images byte-identical to stock's", identical, "share", ">= 1"),
    ]
    samples = {
        "warm host / stock, pairs that count": [pair.ratio for pair in counted],
        "warm host / stock, all pairs": [pair.ratio for pair in pairs],
        "stock, s": [pair.stock.first_s for pair in pairs],
        "warm host, s": [pair.shared.first_s for pair in pairs],
        "stock, second, s": [pair.stock.second_s for pair in pairs],
        "warm host, second, s": [pair.shared.second_s for pair in pairs],
        "stock, others' cores": [pair.stock.others for pair in pairs],
        "warm host, others' cores": [pair.shared.others for pair in pairs],
    }
    notes = [f"{len(quiet)} of {len(pairs)} pairs were undisturbed; {len(counted)} count"]
    return Report.of("first_prompt", figures, samples, comfy=work.comfy, notes=notes)


def _median(values: Iterable[float]) -> float:
    return median(list(values))


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.first_prompt", description=about)
    parser.add_argument("--pairs", type=int, default=5, help="pairs that count (default: 5)")
    workload.add_arguments(parser, arch="sd15", dtype="fp32")
    add_arguments(parser)
    args = parser.parse_args(argv)
    work = workload.from_arguments(args)
    return 0 if emit(report(work, run(work, args.pairs)), args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())

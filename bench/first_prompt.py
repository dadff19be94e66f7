"""A fresh ComfyUI's first prompt: with a warm host against stock.

Pairs of one stock and one shared server, each freshly started, in alternating order; one host serves them all and has
the model loaded before the first pair. Measured is the wall time from POST /prompt to the finished result; starting the
server is not in it. The file is read through before every first prompt, so that stock loads from the page cache. A
second prompt on the same server, which loads nothing, shows how much of the first was sampling.

    python -m bench.first_prompt --pairs 5 --arch sd15 --dtype fp32
"""

from __future__ import annotations

import argparse
import sys
import time

from bench import workload
from bench.host import HostProcess
from bench.report import Figure, Report, add_arguments, emit, median
from bench.workflows import again
from bench.workload import Workload


def two_prompts(work: Workload, host: HostProcess | None) -> tuple[float, float, bytes]:
    """Seconds from POST to result of a fresh server's first and second prompt, and the first image."""
    with work.server(host) as server:
        work.warm()
        began = time.monotonic()
        entry = server.run(work.graph)
        first = time.monotonic()
        server.run(again(work.graph, 1))
        return first - began, time.monotonic() - first, server.image(entry)


def run(work: Workload, pairs: int) -> tuple[dict[str, list[float]], float]:
    """Seconds by kind and prompt, pair by pair, and the share of images equal to the first stock one."""
    took_s: dict[str, list[float]] = {kind: [] for kind in ("stock", "shared", "stock, second", "shared, second")}
    images: dict[str, list[bytes]] = {"stock": [], "shared": []}
    with work.host() as host:
        two_prompts(work, host)  # the host loads the model, in the dtypes this ComfyUI wants
        for index in range(pairs):
            for kind in ("stock", "shared") if index % 2 == 0 else ("shared", "stock"):
                first, second, image = two_prompts(work, host if kind == "shared" else None)
                took_s[kind].append(first)
                took_s[f"{kind}, second"].append(second)
                images[kind].append(image)
                print(f"pair {index + 1}, {kind}: {first:.2f} s, then {second:.2f} s", file=sys.stderr)
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
        Figure("second prompt, stock, median", median(took_s["stock, second"]), "s"),
        Figure("second prompt, warm host, median", median(took_s["shared, second"]), "s"),
        Figure("images byte-identical to stock's", identical, "share", ">= 1"),
    ]
    samples = {f"{kind.replace('shared', 'warm host')}, s": values for kind, values in took_s.items()}
    samples["warm host / stock"] = ratios
    return 0 if emit(Report.of("first_prompt", figures, samples, comfy=work.comfy), args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())

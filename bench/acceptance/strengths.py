"""T8: strengths -1, 0, 0.5, 1 and stacks: in pictures, and in every value of every layer that a LoRA changes.

Pictures show that 0 is no LoRA at all and that the effect grows. Values (bench.acceptance.weight_values, in a process
of ComfyUI's own) show what the layers compute: W + s1 dW1 + s2 dW2 + ..., each value of it, in float32. How far one may
be off follows from the number of roundings that lead to it: one to fold the strength in, one a product and sum over the
rank, one each to add the weight and the bias.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bench.acceptance import graphs
from bench.acceptance.findings import Findings
from bench.acceptance.models import LORAS, RANK, stack
from bench.acceptance.pixels import distance, levels, within_rounding
from bench.acceptance.stage import ONE_THREAD, Stage
from bench.checkpoints import ROOT
from bench.lora_processes import ASYNC_ALLOCATOR

Case = tuple[tuple[str, float], ...]

NAME = "style"
STRENGTHS = (-1.0, 0.0, 0.5, 1.0)
STACKS = ((("style", 1.0), ("light", 0.5)), (("style", -1.0), ("light", 0.5), ("character", 1.0)))
BESIDE = 3
"""Roundings of a value beside the rank's: folding the strength in, adding the weight, adding the bias."""
TIMEOUT_S = 900
TAIL = 3000


class ValuesFailed(Exception):
    """The process that looks at values ended badly; the message ends with its log's tail."""


def run(stage: Stage, found: Findings) -> None:
    cases = [*(((NAME, strength),) for strength in STRENGTHS), *STACKS]
    with _looking(stage, cases) as process:  # it takes its time to start: the pictures are drawn meanwhile
        furthest, effect = _pictures(stage, found)
        found.line = f"the picture changes by {effect} of 255 RMS; at most {furthest} from stock"
        values, worst = _values(found, cases, _answers(process))
    found.line = (
        f"strength 0 is no LoRA, to the bit; at -1, 0.5, 1 the picture changes by {effect} of 255 RMS, at most "
        f"{furthest} from stock; {values / 1e6:.1f} M values of W + dW a case are right to {worst:.1f} roundings of "
        + ("float32" if stage.on_cpu else "half precision")
    )


def _pictures(stage: Stage, found: Findings) -> tuple[int, str]:
    server, furthest = stage.shared, 0
    plain = stage.draw(server, graphs.luna(stage.picture()))
    effects = {}
    for strength in STRENGTHS:
        picture = stage.picture(stack((NAME, strength)))
        ours = stage.draw(server, graphs.luna(picture))
        effects[strength] = distance(ours, plain)
        found.figure(f"effect of strength {strength:g}", effects[strength], "of 255, RMS")
        if strength == 0:
            found.holds("strength 0 is no LoRA, to the bit", (ours == plain).all())
            half = stage.draw(server, graphs.luna(stage.picture(stack((NAME, 0.0, 1e-30)))))
            found.holds("a strength that rounds to nothing changes nothing", (half == plain).all())
            continue
        off = levels(ours, stage.stocks(picture))
        furthest = max(furthest, off)
        close = within_rounding(ours, stage.stocks(picture), stage.on_cpu)
        found.holds(f"strength {strength:g}: the picture is stock's within rounding", close, f"{off} of 255")
    found.holds("the effect grows with the strength", 0 == effects[0.0] < effects[0.5] < effects[1.0], effects)
    found.holds("a negative strength has an effect, too", effects[-1.0] > 0)
    for entries in STACKS:
        picture = stage.picture(stack(*entries))
        ours = stage.draw(server, graphs.luna(picture))
        off = levels(ours, stage.stocks(picture))
        furthest = max(furthest, off)
        close = within_rounding(ours, stage.stocks(picture), stage.on_cpu)
        found.holds(f"{_words(entries)}: the picture is stock's within rounding", close, f"{off} of 255")
        one = stage.draw(server, graphs.luna(stage.picture(stack(entries[0]))))
        found.holds(f"{_words(entries)}: more than its first LoRA", distance(ours, one) > 0)
    return furthest, ", ".join(f"{effects[strength]:.1f}" for strength in STRENGTHS if strength)


def _values(found: Findings, cases: Sequence[Case], lines: Sequence[dict[str, Any]]) -> tuple[int, float]:
    worst, values = 0.0, 0
    for case, line in zip(cases, lines, strict=True):
        words = _words(case)
        worst, values = max(worst, line["roundings"]), line["values"]
        found.holds(f"{words}: layers of model and text encoder", min(line["layers"].values()) > 0, line["layers"])
        allowed = RANK * len(case) + BESIDE
        found.figure(f"{words}: furthest value from W + dW", line["roundings"], "roundings", f"<= {allowed}")
        if case[0][1] == 0:
            found.holds(f"{words}: every layer computes what it did without, to the bit", line["identical"])
        else:
            least = line["least_change"]
            found.holds(f"{words}: every layer is changed", least > 0, f"by {least:.3g} of its norm at least")
    found.series({"furthest value from W + dW, roundings, by case": [line["roundings"] for line in lines]})
    return values, worst


@contextlib.contextmanager
def _looking(stage: Stage, cases: Sequence[Case]) -> Iterator[subprocess.Popen[str]]:
    """The process that looks at values; it is gone afterwards."""
    asked = {
        "checkpoint": str(stage.models.path(stage.models.name)), "cpu": stage.on_cpu, "columns": stage.scale.columns,
        "loras": [str(stage.models.lora(name)) for name in LORAS],
        "cases": [[[LORAS.index(name), strength] for name, strength in case] for case in cases],
    }  # fmt: skip
    environment = stage.host.environment | (ONE_THREAD if stage.on_cpu else ASYNC_ALLOCATOR) | {
        "PYTHONPATH": os.pathsep.join([str(stage.comfy), str(ROOT)]), "LUNASHM_MODE": "force_daemon",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.acceptance.weight_values", json.dumps(asked)], cwd=ROOT, text=True,
        env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        with process:
            yield process
    finally:
        process.kill()


def _answers(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """One of each case."""
    answers, log = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise ValuesFailed(f"looking at values ended with {process.returncode}\n{log[-TAIL:]}")
    return [json.loads(line) for line in answers.splitlines()]


def _words(case: Case) -> str:
    """``style 1 + light 0.5``."""
    return " + ".join(f"{name} {strength:g}" for name, strength in case)

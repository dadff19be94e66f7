"""LoRAs on a diffusion model: no LoRA, ours, stock merge and stock bypass, side by side in one run.

One process for each way keeps the model and runs one step (two latents, as a prompt and its negative) when its turn
comes; only one works at a time, and the ways take turns at every depth. A step with LoRAs is always timed next to one
without in the same process, each after a step that is not timed; the order of the two alternates. An overhead is the
ratio of such a pair, less one. A switch is timed from a model that has run with a stack of two to `load_models_gpu` of
the other stack of two having returned; reading the files is in neither, and what a way puts off until the first step is
shown by that step.

A sample counts when nobody else used more than a quarter of a core meanwhile. There are more rounds, up to twice as
many, until enough count; where fewer than three do in the end, all count. The samples hold every one.

    python -m bench.lora --arch sd15 --arch flux-1536
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import checkpoints, lora_chart
from bench.lora_client import WAYS
from bench.lora_figures import Measured, Memory, Pair, Switch, difference, figures, samples
from bench.lora_processes import ClientProcess, Setting, prepared, running
from bench.quiet import Stopwatch
from bench.report import Report, add_arguments, emit

ARCHS = ("sd15", "sd15-tiny", "sd3-tiny", "flux-tiny", "flux-1536")
DEFAULT = ARCHS[0], ARCHS[-1]
DEPTHS = (1, 2, 4, 8)
STACKS = ((0, 1), (2, 3))
SAME = 1e-6
NOTES = (
    "all processes keep freed memory (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_): with glibc's defaults new "
    "pages, not LoRAs, decide over a step of SD1.5",
    "floor: operations of the two thin products of each call of each patched layer, over those of the whole step "
    "without LoRA (matrix products, convolutions, attention); 2 sum(r) / d for a step of square layers only",
    "to be checked on a GPU: at most +3% per step at rank sum 32 on SDXL at 1024x1024",
    "to be checked on a GPU: at most +10% per step with 8 LoRAs of rank 16 on SDXL at 1024x1024",
)

Processes = Mapping[str, ClientProcess]


def run(setting: Setting, rank: int, depths: Sequence[int], rounds: int) -> Measured:
    measured = Measured(setting.arch, rank)
    with running(setting) as processes:
        for process in processes.values():
            process.ask("load", stack=[])
            process.ask("step")
        _examine(measured, processes, depths)
        done = 0
        while done < rounds or (done < 2 * rounds and _disturbed(measured, rounds)):
            for index, depth in enumerate(depths):
                for way in _turns(done + index):
                    measured.pairs.append(_pair(processes, way, depth, done, setting.repeats))
            for way in _turns(done):
                measured.switches.append(_switch(processes, way, done))
            done += 1
            print(f"{setting.arch}: round {done} done, {rounds} wanted", file=sys.stderr)
    return measured


def _turns(shift: int) -> list[str]:
    """The ways, another one first each time."""
    return [WAYS[(shift + index) % len(WAYS)] for index in range(len(WAYS))]


def _disturbed(measured: Measured, wanted: int) -> bool:
    """Whether some cell of the table has fewer undisturbed samples than are wanted."""
    cells: dict[tuple[str, int], int] = {}
    for pair in measured.pairs:
        cells[pair.way, pair.depth] = cells.get((pair.way, pair.depth), 0) + pair.quiet
    for switch in measured.switches:
        cells[switch.way, 0] = cells.get((switch.way, 0), 0) + switch.quiet
    return min(cells.values()) < wanted


def _pair(processes: Processes, way: str, depth: int, index: int, repeats: int) -> Pair:
    process, seconds, others = processes[way], {}, []
    for stack in sorted(([], list(range(depth))), reverse=index % 2 == 1):
        process.ask("load", stack=stack)
        process.ask("step")
        watch = Stopwatch([process.pid])
        seconds[len(stack)] = process.ask("step", count=repeats)
        others.append(watch.read()[1])
    return Pair(way, depth, index, seconds[0], seconds[depth], max(others))


def _switch(processes: Processes, way: str, index: int) -> Switch:
    process = processes[way]
    before, after = STACKS if index % 2 == 0 else STACKS[::-1]
    process.ask("load", stack=before)
    process.ask("step")
    watch = Stopwatch([process.pid])
    ready_s, first_s, next_s = process.ask("load", stack=after), process.ask("step"), process.ask("step")
    return Switch(way, index, ready_s, first_s, next_s, watch.read()[1])


def _examine(measured: Measured, processes: Processes, depths: Sequence[int]) -> None:
    """What needs no clock: shapes, operations, memory, and that all ways compute the same."""
    measured.calls = [tuple(call) for call in processes["ours"].ask("layers", stack=[0])]
    measured.step_flops = processes["merge"].ask("flops")
    outputs = {}
    for way, process in processes.items():
        for depth in depths:
            process.ask("load", stack=list(range(depth)))
            measured.flops[way, depth] = process.ask("flops")
        outputs[way] = process.ask("output")
        measured.memory[way] = _memory(process)
    measured.differences = {way: difference(outputs[way], outputs["merge"]) for way in ("ours", "bypass")}
    last = processes["bypass"]
    chained = last.ask("chained", stack=list(STACKS[0]))
    last.ask("load", stack=[STACKS[0][-1]])
    measured.chained_last_only = difference(chained, last.ask("output")) < SAME


def _memory(process: ClientProcess) -> Memory:
    """What the second stack adds, everything having been used once before."""
    found = {}
    for stack in (STACKS[1], (), STACKS[1]):
        process.ask("load", stack=stack)
        process.ask("step")
        found[stack] = process.ask("counted_nbytes"), process.ask("private_nbytes")
    (counted, measured), (counted_without, measured_without) = found[STACKS[1]], found[()]
    factors = process.ask("factor_nbytes", stack=STACKS[1])
    return Memory(counted - counted_without, measured - measured_without, factors)


def report(found: Sequence[Measured], settings: Sequence[Setting]) -> Report:
    notes = list(NOTES)
    for measured, setting in zip(found, settings, strict=True):
        layers = len(measured.calls)
        quiet = sum(pair.quiet for pair in measured.pairs)
        notes.append(
            f"{measured.arch}: {setting.size} px, batch of 2, float32, {measured.step_flops / 1e9:.0f} G operations a "
            f"step; {layers} layer calls patched; {quiet} of {len(measured.pairs)} pairs undisturbed"
        )
        deepest = max(measured.depths)
        spent = ", ".join(
            f"{way} {measured.flops[way, deepest] / measured.step_flops * 100 - 100:+.1f}%" for way in WAYS
        )
        notes.append(f"{measured.arch}: operations actually done with {deepest} LoRAs, over none: {spent}")
        kept = "the last LoRA alone" if measured.chained_last_only else "more than the last LoRA"
        notes.append(
            f"{measured.arch}: stock bypass as its own loader chains it keeps {kept}, by its output; here every LoRA "
            "of the stack is put in effect, one injection each"
        )
    return Report.of(
        "lora",
        [figure for measured in found for figure in figures(measured)],
        {name: values for measured in found for name, values in samples(measured).items()},
        comfy=settings[0].comfy,
        notes=notes,
    )


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.lora", description=about)
    parser.add_argument("--arch", action="append", choices=ARCHS, help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument("--size", type=int, default=256, help="image side in pixels (default: 256)")
    parser.add_argument("--rank", type=int, default=16, help="of each LoRA (default: 16)")
    parser.add_argument("--depths", type=_numbers, default=DEPTHS, help="LoRAs in a stack (default: 1,2,4,8)")
    parser.add_argument("--rounds", type=int, default=5, help="samples that count (default: 5)")
    parser.add_argument("--comfy", type=Path, help="ComfyUI checkout (default: $LUNASHM_COMFYUI, else ~/ComfyUI)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    found, settings = [], []
    count = max(*args.depths, 1 + max(map(max, STACKS)))
    for arch in args.arch or DEFAULT:
        with prepared(arch, args.size, count, args.rank, checkpoints.comfy_root(args.comfy)) as setting:
            found.append(run(setting, args.rank, args.depths, args.rounds))
            settings.append(setting)
    draw = functools.partial(lora_chart.draw, found)
    return 0 if emit(report(found, settings), args.json, args.save, draw) else 1


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())

"""What bench.lora's timings say: overheads of pairs, the arithmetic floor, figures. Plain functions; times nothing.

The floor of a stack of rank sum R is arithmetic alone: the two thin products of every call of every patched layer, with
the tokens of that call, over what the whole step multiplies and adds without LoRA.

    floor = sum over calls of 2 * tokens * R * (in + out) / operations of the step

For a step that were nothing but one square layer of width d this is 2 R / d.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bench.quiet import QUIET_CORES
from bench.report import Figure, median

ENOUGH = 3
FLOOR_FROM_RANK = 64
PERCENT = 100.0

Call = tuple[int, int, int]
"""(tokens, out, in) of one call of a layer."""


@dataclass(frozen=True)
class Pair:
    """Two steps of one process, one after the other: without LoRA and with `depth` of them."""

    way: str
    depth: int
    round: int
    base_s: float
    lora_s: float
    others: float

    @property
    def overhead(self) -> float:
        return self.lora_s / self.base_s - 1.0

    @property
    def quiet(self) -> bool:
        return self.others <= QUIET_CORES


@dataclass(frozen=True)
class Switch:
    """From a model that ran with one stack to one that is ready to run with another, and its first steps then."""

    way: str
    round: int
    ready_s: float
    first_step_s: float
    next_step_s: float
    others: float

    @property
    def quiet(self) -> bool:
        return self.others <= QUIET_CORES


_Sample = TypeVar("_Sample", Pair, Switch)


@dataclass(frozen=True)
class Memory:
    """Bytes that a stack adds: as ComfyUI's patcher counts them, as the kernel does, and in the bare factors."""

    counted: int
    measured: int
    factors: int


@dataclass
class Measured:
    """Everything about one architecture."""

    arch: str
    rank: int
    calls: Sequence[Call] = ()
    step_flops: float = 0.0
    flops: dict[tuple[str, int], float] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    chained_last_only: bool = False

    @property
    def depths(self) -> list[int]:
        return sorted({pair.depth for pair in self.pairs})

    def floor(self, depth: int) -> float:
        return branch_flops(self.calls, depth * self.rank) / self.step_flops

    def overhead(self, way: str, depth: int) -> float:
        return median([pair.overhead for pair in counted(self.of(way, depth))])

    def of(self, way: str, depth: int) -> list[Pair]:
        return [pair for pair in self.pairs if (pair.way, pair.depth) == (way, depth)]


def branch_flops(calls: Iterable[Call], rank: int) -> float:
    """Operations (a multiply-add counts as two) of x A^T B^T with A (rank, in) and B (out, rank), over all calls."""
    return float(sum(2 * tokens * rank * (columns + rows) for tokens, rows, columns in calls))


def counted(samples: Sequence[_Sample]) -> list[_Sample]:
    """Those that nobody disturbed, if there are enough; else all."""
    quiet = [sample for sample in samples if sample.quiet]
    return quiet if len(quiet) >= ENOUGH else list(samples)


def ratios(ours: Sequence[Pair], theirs: Sequence[Pair]) -> list[float]:
    """Our step over theirs, round by round; undisturbed rounds only, if there are enough."""
    other = {pair.round: pair for pair in theirs}
    both = [(pair, other[pair.round]) for pair in ours if pair.round in other]
    quiet = [(a, b) for a, b in both if a.quiet and b.quiet]
    return [a.lora_s / b.lora_s for a, b in (quiet if len(quiet) >= ENOUGH else both)]


def difference(output: Sequence[float], reference: Sequence[float]) -> float:
    """Norm of the difference over that of the reference."""
    apart = sum((a - b) ** 2 for a, b in zip(output, reference, strict=True))
    return float((apart / sum(b * b for b in reference)) ** 0.5)


def many(depth: int) -> str:
    return "1 LoRA" if depth == 1 else f"{depth} LoRAs"


def figures(measured: Measured) -> list[Figure]:
    return [*_steps(measured), *_switches(measured), *_memory(measured), *_agreement(measured)]


def _steps(measured: Measured) -> list[Figure]:
    arch = measured.arch
    found = [
        Figure(f"{arch}: step without LoRA, {name}", median([p.base_s for p in counted(own)]), "s")
        for name, own in (
            ("ours", [p for p in measured.pairs if p.way == "ours"]),
            ("stock", [p for p in measured.pairs if p.way != "ours"]),
        )
    ]
    for depth in measured.depths:
        rank, floor = depth * measured.rank, measured.floor(depth)
        label = f"{arch}, {many(depth)} (rank sum {rank})"
        overhead = {way: measured.overhead(way, depth) for way in ("ours", "merge", "bypass")}
        against = median(ratios(measured.of("ours", depth), measured.of("bypass", depth)))
        found += [
            Figure(f"{label}: ours, overhead over no LoRA", overhead["ours"] * PERCENT, "%"),
            Figure(f"{label}: arithmetic floor", floor * PERCENT, "%"),
            Figure(
                f"{label}: ours, overhead / floor", overhead["ours"] / floor, "ratio",
                "<= 1.5" if rank >= FLOOR_FROM_RANK else None,
            ),
            Figure(f"{label}: stock merge, overhead over no LoRA", overhead["merge"] * PERCENT, "%"),
            Figure(f"{label}: stock bypass, overhead over no LoRA", overhead["bypass"] * PERCENT, "%"),
            Figure(f"{label}: step, ours / stock bypass, median of pairs", against, "ratio", "<= 1"),
        ]  # fmt: skip
    return found


def _switches(measured: Measured) -> list[Figure]:
    label = f"{measured.arch}, switch of a stack of 2"
    ways = {way: counted([s for s in measured.switches if s.way == way]) for way in ("ours", "merge", "bypass")}
    ready = {way: median([s.ready_s for s in own]) for way, own in ways.items()}
    stock = {s.round: s for s in ways["merge"]}
    faster = [stock[s.round].ready_s / s.ready_s for s in ways["ours"] if s.round in stock]
    paired = median(faster) if faster else ready["merge"] / ready["ours"]
    lost = {way: median([s.first_step_s - s.next_step_s for s in own]) for way, own in ways.items()}
    return [
        Figure(f"{label}: stock merge / ours, median of pairs", paired, "ratio", ">= 10"),
        Figure(f"{label}: ours", ready["ours"], "s"),
        Figure(f"{label}: stock merge", ready["merge"], "s"),
        Figure(f"{label}: stock bypass", ready["bypass"], "s"),
        Figure(f"{label}: the first step then, beyond a later one, ours", lost["ours"], "s"),
        Figure(f"{label}: the first step then, beyond a later one, stock merge", lost["merge"], "s"),
    ]


def _memory(measured: Measured) -> list[Figure]:
    label, memory = f"{measured.arch}, private memory of a stack of 2", measured.memory
    ours = memory["ours"]
    return [
        Figure(f"{label}: ours, counted by the patcher / factors", ours.counted / ours.factors, "ratio", "<= 1.2"),
        Figure(f"{label}: ours, measured / factors", ours.measured / ours.factors, "ratio"),
        Figure(f"{label}: factors in the dtype computed in", ours.factors / 1e6, "MB"),
        Figure(f"{label}: stock merge, measured", memory["merge"].measured / 1e6, "MB"),
    ]


def _agreement(measured: Measured) -> list[Figure]:
    depth = max(measured.depths)
    return [
        Figure(f"{measured.arch}, {many(depth)}: output of {way} against stock merge, relative", apart, "ratio")
        for way, apart in measured.differences.items()
    ]


def samples(measured: Measured) -> Mapping[str, list[float]]:
    """Every pair and every switch, counted or not."""
    found: dict[str, list[float]] = {}
    for pair in measured.pairs:
        label = f"{measured.arch}, {pair.way}, {many(pair.depth)}"
        found.setdefault(f"{label}: overhead, %", []).append(pair.overhead * PERCENT)
        found.setdefault(f"{label}: step, s", []).append(pair.lora_s)
        found.setdefault(f"{measured.arch}, {pair.way}: step without LoRA, s", []).append(pair.base_s)
        found.setdefault(f"{measured.arch}, {pair.way}: others' cores during a pair", []).append(pair.others)
    for switch in measured.switches:
        label = f"{measured.arch}, {switch.way}: switch of 2"
        found.setdefault(f"{label}, s", []).append(switch.ready_s)
        found.setdefault(f"{label}, first step then, s", []).append(switch.first_step_s)
        found.setdefault(f"{label}, next step, s", []).append(switch.next_step_s)
    return found

"""Every kind of patch that ComfyUI knows, on small layers; imported inside ComfyUI's environment.

The reference is a layer with the weight that ``comfy.lora.calculate_weight`` makes in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.lora
import comfy.ops
import torch
from comfy.weight_adapter.boft import BOFTAdapter
from comfy.weight_adapter.glora import GLoRAAdapter
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from comfy.weight_adapter.oft import OFTAdapter

from comfy_ext.adapters import update_of
from comfy_ext.layers import _plain
from lunashm.client.lowrank import inject, injection

R = torch.randn
LINEAR, SQUARE, FUSED, WIDE, CONV = (64, 96), (64, 64), (192, 96), (64, 288), (48, 32, 3, 3)
ALWAYS, NEVER = {"cpu": -(1 << 40)}, {"cpu": 1 << 40}


@dataclass
class Case:
    name: str
    shape: tuple[int, ...]
    patches: list[Any]
    dense: bool
    """Whether the weight is made anew at each call because there is no other form."""


def patch(strength: float, value: Any, strength_model: float = 1.0, offset: Any = None, function: Any = None) -> Any:
    return (strength, value, strength_model, offset, function)


def lora(
    rows: int,
    columns: int,
    kernel: int = 0,
    *,
    rank: int = 8,
    alpha: float | None = 4.0,
    mid: bool = False,
    dora: str = "",
) -> LoRAAdapter:
    up, down, middle = R(rows, rank), R(rank, columns) * 0.05, None
    tail = [1, 1] if kernel else []
    if kernel:
        up = R(rows, rank, 1, 1)
        down = R(rank, columns, *([1, 1] if mid else [kernel, kernel])) * 0.05
        middle = R(rank, rank, kernel, kernel) * 0.3 if mid else None
    shapes = {"out": (rows, 1, *tail), "in": (1, columns, *tail)}
    magnitude = torch.rand(shapes[dora]) + 5.0 if dora else None
    return LoRAAdapter(set(), (up, down, alpha, middle, magnitude, None))


def loha(rank: int, kernel: int = 0) -> LoHaAdapter:
    if kernel:
        ends = [R(rank, CONV[0]) * 0.3, R(rank, CONV[1]) * 0.3]
        cores = [R(rank, rank, kernel, kernel) * 0.3 for _ in range(2)]
        return LoHaAdapter(set(), (ends[0], ends[1], 2.0, ends[0] * 0.5, ends[1] * 2, *cores, None))
    rows, columns = LINEAR
    return LoHaAdapter(
        set(), (R(rows, rank), R(rank, columns) * 0.2, 2.0, R(rows, rank), R(rank, columns) * 0.2, None, None, None)
    )


def lokr(shape: tuple[int, ...], *, w1: str = "whole", w2: str = "whole", dora: bool = False) -> LoKrAdapter:
    o1, i1 = 4, 8
    o2, i2, kernel = shape[0] // o1, shape[1] // i1, shape[2:]
    ones = [1] * len(kernel)
    first = (R(o1, i1) * 0.3, None, None) if w1 == "whole" else (None, R(o1, 2), R(2, i1) * 0.3)
    second: tuple[Any, ...] = (R(o2, i2, *kernel) * 0.1, None, None, None)
    if w2 == "pair":
        second = (None, R(o2, 4), R(4, i2 * torch.Size(kernel).numel()) * 0.1, None)
    elif w2 == "tucker":
        second = (None, R(4, o2), R(4, i2) * 0.1, R(4, 4, *kernel) * 0.3)
    magnitude = torch.rand(shape[0], 1, *ones) + 5.0 if dora else None
    return LoKrAdapter(
        set(), (first[0], second[0], 3.0, first[1], first[2], second[1], second[2], second[3], magnitude)
    )


def glora(rows: int, columns: int, *, old: bool = False) -> GLoRAAdapter:
    a1, a2, b1, b2 = R(columns, 4) * 0.1, R(4, columns) * 0.3, R(rows, 4), R(4, columns) * 0.1
    return GLoRAAdapter(set(), (a2, a1, b2, b1, 2.0, None) if old else (a1, a2, b1, b2, 2.0, None))


def glora_conv() -> GLoRAAdapter:
    rows, columns, *_ = CONV
    factors = R(columns, 4, 1, 1) * 0.1, R(4, columns, 1, 1) * 0.3, R(rows, 4, 1, 1), R(4, columns, 3, 3) * 0.1
    return GLoRAAdapter(set(), (*factors, 2.0, None))


def swap_halves(weight: torch.Tensor) -> torch.Tensor:
    shift, scale = weight.chunk(2, dim=0)
    return torch.cat([scale, shift], dim=0)


def merged_model(shape: tuple[int, ...]) -> list[Any]:
    """As ModelMergeSimple does: the other model's weight, with a patch of its own."""
    return [(R(*shape), lambda a, **_: a), patch(0.5, lora(*shape))]


def cases() -> list[Case]:
    torch.manual_seed(0)
    rows_part, columns_part = (0, 64, 64), (1, 96, 96)
    return [
        Case("lora", LINEAR, [patch(0.8, lora(*LINEAR))], False),
        Case("lora, negative, no alpha", LINEAR, [patch(-0.5, lora(*LINEAR, rank=4, alpha=None))], False),
        Case("lora twice", LINEAR, [patch(0.8, a := lora(*LINEAR)), patch(0.8, a)], False),
        Case("strength_model", LINEAR, [patch(0.8, lora(*LINEAR)), patch(-0.5, lora(*LINEAR), 0.7)], False),
        Case("strength 0, strength_model", LINEAR, [patch(0.0, lora(*LINEAR), 0.7)], False),
        Case("rows of a fused weight", FUSED, [
            patch(0.8, lora(*LINEAR), offset=rows_part), patch(0.3, lora(*FUSED), 0.9),
            patch(0.4, lora(*LINEAR), 0.5, (0, 0, 64)),
        ], False),
        Case("columns of a fused weight", WIDE, [
            patch(0.8, lora(*LINEAR), offset=columns_part), patch(0.3, lora(*WIDE), 0.9),
            patch(0.4, lora(*LINEAR), 0.5, (1, 0, 96)),
        ], False),
        Case("rows exchanged", LINEAR, [patch(0.8, lora(*LINEAR), function=swap_halves)], False),
        Case("rows of a part exchanged", FUSED, [patch(0.8, lora(*LINEAR), 1.0, rows_part, swap_halves)], False),
        Case("a function that does more", LINEAR, [patch(0.8, lora(*LINEAR), function=lambda w: w.flip(1))], True),
        Case("conv", CONV, [patch(0.8, lora(48, 32, 3))], False),
        Case("locon with mid", CONV, [patch(0.8, lora(48, 32, 3, mid=True))], False),
        Case("dora, outputs", LINEAR, [
            patch(0.4, lora(*LINEAR)), patch(0.8, lora(*LINEAR, dora="out")),
            patch(1.0, lora(*LINEAR, dora="out"), 0.9),
        ], False),
        Case("dora, inputs", LINEAR, [
            patch(0.4, lora(*LINEAR)), patch(0.8, lora(*LINEAR, dora="in")), patch(1.0, lora(*LINEAR, dora="out")),
        ], False),
        Case("dora, inputs of a square layer", SQUARE, [patch(0.8, lora(*SQUARE, dora="in"))], False),
        Case("dora of a conv", CONV, [
            patch(0.4, lora(48, 32, 3)), patch(0.8, lora(48, 32, 3, dora="out")),
            patch(0.6, lora(48, 32, 3, dora="in")),
        ], False),
        Case("dora of a part", FUSED, [patch(0.4, lora(*LINEAR, dora="out"), offset=rows_part)], False),
        Case("dora with rows exchanged", LINEAR, [patch(0.7, lora(*LINEAR, dora="out"), function=swap_halves)], False),
        Case("dora across a part", FUSED, [patch(0.4, lora(*LINEAR, dora="in"), offset=rows_part)], True),
        Case("loha", LINEAR, [patch(0.4, loha(4))], False),
        Case("loha of a high rank", LINEAR, [patch(0.4, loha(32))], True),
        Case("loha in cp form", CONV, [patch(0.4, loha(4, 3))], True),
        Case("lokr", LINEAR, [patch(0.4, lokr(LINEAR))], False),
        Case("lokr of pairs", LINEAR, [patch(0.4, lokr(LINEAR, w1="pair", w2="pair"))], False),
        Case("lokr of a part, scaled", FUSED, [
            patch(0.4, lokr(LINEAR), offset=rows_part), patch(0.3, lora(*FUSED), 0.9),
        ], False),
        Case("lokr of a conv", CONV, [patch(0.4, lokr(CONV))], False),
        Case("lokr of a conv, pair", CONV, [patch(0.4, lokr(CONV, w2="pair"))], False),
        Case("lokr of a conv, tucker", CONV, [patch(0.4, lokr(CONV, w2="tucker"))], False),
        Case("lokr, then dora", LINEAR, [patch(0.4, lokr(LINEAR)), patch(0.8, lora(*LINEAR, dora="out"))], False),
        Case("lokr with dora", LINEAR, [patch(0.4, lokr(LINEAR, dora=True))], True),
        Case("glora", LINEAR, [patch(0.3, lora(*LINEAR)), patch(0.4, glora(*LINEAR))], False),
        Case("glora, old form", LINEAR, [patch(0.4, glora(*LINEAR, old=True))], False),
        Case("glora of a conv", CONV, [patch(0.4, glora_conv())], True),
        Case("oft", LINEAR, [patch(0.9, OFTAdapter(set(), (R(8, 8, 8) * 0.05, None, None, None)))], True),
        Case("oft, constrained", LINEAR, [patch(0.9, OFTAdapter(set(), (R(8, 8, 8), None, 2.0, None)))], True),
        Case("boft", LINEAR, [patch(0.9, BOFTAdapter(set(), (R(2, 8, 8, 8) * 0.05, None, 0.0, None)))], True),
        Case("diff", LINEAR, [patch(0.5, ("diff", (R(*LINEAR),))), patch(0.8, lora(*LINEAR))], True),
        Case("set", LINEAR, [patch(0.0, ("set", (R(*LINEAR),))), patch(0.8, lora(*LINEAR), 0.9)], True),
        Case("model_as_lora", LINEAR, [patch(0.5, ("model_as_lora", (R(*LINEAR),)))], True),
        Case("model merge", LINEAR, [patch(0.4, merged_model(LINEAR), 0.6), patch(0.8, lora(*LINEAR))], True),
        Case("a mix of everything", SQUARE, [
            patch(0.4, lora(*SQUARE)), patch(0.3, lokr(SQUARE)), patch(0.9, lora(*SQUARE, dora="out")),
            patch(0.2, OFTAdapter(set(), (R(8, 8, 8) * 0.05, None, None, None))), patch(-0.5, glora(*SQUARE), 0.8),
            patch(0.3, lora(32, 64), offset=(0, 32, 32)), patch(0.5, lokr(SQUARE), 0.9),
        ], True),
    ]  # fmt: skip


def tucker(one: Any) -> torch.Tensor:
    """What LyCORIS means by a LoKr with a core: kron(w1, core x_1 w2_a x_2 w2_b), alpha / rank."""
    w1, _, alpha, _, _, w2a, w2b, t2, _ = one[1].weights
    second = torch.einsum("ijkl,ip,jr->prkl", t2, w2a, w2b).contiguous()
    return torch.kron(w1[:, :, None, None], second) * (one[0] * alpha / w2b.shape[0])


def layer(shape: tuple[int, ...], weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.nn.Module:
    ops = comfy.ops.disable_weight_init
    made = ops.Linear(shape[1], shape[0]) if len(shape) == 2 else ops.Conv2d(shape[1], shape[0], 3, padding=1)
    made.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    made.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
    return made


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@torch.inference_mode()
def compare(case: Case, dtype: torch.dtype, passes: dict[str, int]) -> tuple[float, float, float]:
    """Errors of ours and of stock's merged layer against float64, and how much the patches change at all."""
    torch.manual_seed(1)
    weight, bias = (R(*case.shape) / case.shape[1] ** 0.5).to(dtype), R(case.shape[0]).to(dtype)
    x = R(300, case.shape[1]) if len(case.shape) == 2 else R(3, case.shape[1], 10, 10)
    x = x.to(dtype)
    originals = {"key": [(weight.float(), None)]}

    def merged() -> torch.Tensor:
        given = weight.to(torch.float32, copy=True)
        if case.name == "lokr of a conv, tucker":
            return given + tucker(case.patches[0])  # stock: an error, kron() of a strided tensor
        result: torch.Tensor = comfy.lora.calculate_weight(case.patches, given, "key", original_weights=originals)
        return result

    exact = layer(case.shape, merged(), bias, torch.float64)(x.double())
    stock = layer(case.shape, comfy.float.stochastic_rounding(merged(), dtype, seed=1), bias, dtype)(x)
    ours = layer(case.shape, weight, bias, dtype)
    plain = ours(x)
    injection.PASS_MACS = passes
    update = update_of(case.patches, weight, "key", originals)
    if update.is_dense != case.dense:
        raise AssertionError(f"{case.name}: dense is {update.is_dense}")
    put = inject(ours, update, _plain)
    errors = relative(ours(x), exact), relative(stock, exact), relative(plain, exact)
    put.remove()
    if not torch.equal(ours(x), plain):
        raise AssertionError(f"{case.name}: something is left")
    return errors


def results(dtype: torch.dtype) -> Iterator[tuple[str, str, float, float, float]]:
    """One line for each case and way of computing it."""
    ways: dict[str, dict[str, int]] = {"branch": NEVER, "merged": ALWAYS}
    for case in cases():
        for way, passes in ways.items():
            yield case.name, way, *compare(case, dtype, passes)


def main() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, way, ours, stock, plain in results(dtype):
            print(str(dtype).removeprefix("torch."), name, way, ours, stock, plain, sep="\t")

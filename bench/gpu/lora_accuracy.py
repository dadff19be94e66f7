"""How far a LoRA's output is from exact in half precision on this GPU: as branch, as fresh weight, as merged weight.

Exact is float64 with the rounded weight, bias, input and factors that all ways are given. Merged is what stock does:
dW in float32, added, rounded to the weight's dtype. Error: norm of the difference over that of the LoRA's own
contribution, so that a LoRA that is lost in rounding shows as 1.
"""

from __future__ import annotations

import torch

from bench.gpu.part import Context, Measured
from bench.lora_rule import BRANCH, FRESH, SDXL_LAYERS
from bench.random_weights import DTYPES
from bench.report import Figure
from lunashm.client.lowrank import Injection, Update, injection

DRY_LAYERS = {"toy 64": (64, 64, 32), "toy 64 -> 256": (64, 256, 32)}
STRENGTHS = (1.0, 0.1)
RANK = 32
POSITIONS = 512
SEED = 5


def run(context: Context) -> Measured:
    layers = DRY_LAYERS if context.dry else SDXL_LAYERS
    device = "cpu" if context.dry else context.device
    figures, samples = [], {}
    for name in ("fp16", "bf16"):
        worst: dict[str, list[float]] = {"branch": [], "fresh weight": []}
        for layer, (columns, rows, positions) in layers.items():
            for strength in STRENGTHS:
                shape = rows, columns, min(positions, POSITIONS)
                errors = errors_of(shape, strength, device, DTYPES[name])
                label = f"{name}, {layer}, {strength:g} of the weight"
                figures += [Figure(f"{label}: error, {way}", error, "ratio") for way, error in errors.items()]
                for way, series in worst.items():
                    series.append(errors[way] / errors["merged"])
        for way, series in worst.items():
            label = f"{name}: error of a {way} / of merged weights"
            figures.append(Figure(f"{label}, worst", max(series), "ratio", "<= 1.1"))
            samples[label] = series
    return Measured(figures, samples)


@torch.inference_mode()
def errors_of(shape: tuple[int, int, int], strength: float, device: str, dtype: torch.dtype) -> dict[str, float]:
    """`shape`: out, in, positions. `strength` 1: dW is about as large as the weight."""
    rows, columns, positions = shape
    generator = torch.Generator().manual_seed(SEED)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    module = torch.nn.Linear(columns, rows, device="cpu", dtype=dtype)
    module.weight.copy_(random(rows, columns, scale=columns**-0.5))
    module.bias.copy_(random(rows, scale=0.02))
    up, down = random(rows, RANK, scale=strength * RANK**-0.5), random(RANK, columns, scale=columns**-0.5)
    x = random(positions, columns)
    change = x.double() @ down.double().T @ up.double().T
    exact = x.double() @ module.weight.double().T + module.bias.double() + change
    merged = (module.weight.float() + up.float() @ down.float()).to(dtype)
    module, x = module.to(device), x.to(device)
    found = {"merged": torch.nn.functional.linear(x, merged.to(device), module.bias)}
    update = Update((rows, columns))
    update.add(up.float(), down.float())
    put = Injection(module, update)
    kind, standard = torch.device(device).type, dict(injection.PASS_MACS)
    try:
        for way, constant in (("branch", BRANCH), ("fresh weight", FRESH)):
            injection.PASS_MACS[kind] = constant
            found[way] = module(x)
    finally:
        injection.PASS_MACS.clear()
        injection.PASS_MACS.update(standard)
        put.remove()
    size = float(change.norm())
    return {way: float((output.cpu().double() - exact).norm()) / size for way, output in found.items()}

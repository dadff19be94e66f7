"""Runs inside ComfyUI's environment: which weights layers under LoRAs compute with, value by value. Judges nothing.

A shared model is asked, not looked into: a layer that is given unit vectors answers with columns of the weight that it
computes with, bias added. Each value is held against W + s1 B1 A1 + s2 B2 A2 + ... of the file's own factors, in
float64. A few vectors at first, then many at once: which way a layer goes depends on their number.

One JSON line a case: how many layers and values, and the furthest value, in roundings: of the sum of the absolute
values of what is added up, which is what float arithmetic rounds relative to.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FEW, MANY = 8, 1024
SEED = 3

Factors = dict[str, torch.Tensor]
Case = Sequence[tuple[int, float]]


class Model:
    """A checkpoint's diffusion model and text encoder, shared, and LoRA files for both."""

    def __init__(self, checkpoint: Path, loras: Sequence[Path], cpu: bool, columns: int | None) -> None:
        importlib.import_module("comfy.cli_args").args.cpu = cpu  # before anything asks for a device
        self._sd = importlib.import_module("comfy.sd")
        self._management = importlib.import_module("comfy.model_management")
        importlib.import_module("comfy_ext")
        load_file_in_comfy = importlib.import_module("comfy.utils").load_torch_file
        self._model, self._clip = self._sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)[:2]
        self._loras = [load_file_in_comfy(str(file), safe_load=True) for file in loras]
        self._factors = [load_file(file) for file in loras]  # read without ComfyUI and without lunashm
        self._columns, self._cpu = columns, cpu
        self._plain: dict[str, bytes] = {}

    def look(self, case: Case) -> dict[str, Any]:
        model, clip = self._model, self._clip
        for index, strength in case:
            model, clip = self._sd.load_lora_for_models(model, clip, self._loras[index], strength, strength)
        if not self._plain:
            self._load(self._model, self._clip)
            self._plain = {name: _digest(self._answer(module)) for name, module in self._layers(model, clip)}
        self._load(model, clip)
        found: dict[str, Any] = {"layers": {"model": 0, "clip": 0}, "values": 0, "roundings": 0.0, "identical": True}
        least = float("inf")
        for name, module in self._layers(model, clip):
            answer = self._answer(module)
            exact, terms, change = self._exact(name, module, case)
            rounding = torch.finfo(answer.dtype).eps / 2
            off = (answer.double() - exact).abs() / (rounding * terms).clamp(min=1e-300)
            found["layers"]["model" if name.startswith("diffusion_model.") else "clip"] += 1
            found["values"] += answer.numel()
            found["roundings"] = max(found["roundings"], float(off.max()))
            found["identical"] &= _digest(answer) == self._plain[name]
            least = min(least, change / float(exact.norm()))
        return found | {"least_change": least}

    def _load(self, model: Any, clip: Any) -> None:  # noqa: ANN401 - ComfyUI has no types
        self._management.load_models_gpu([model, clip.patcher], force_full_load=True)

    def _layers(self, model: Any, clip: Any) -> Iterator[tuple[str, torch.nn.Module]]:  # noqa: ANN401
        """Every layer that the case patches, as the LoRA's file calls it."""
        for patcher, prefix in ((model, ""), (clip.patcher, "text_encoders.")):
            for key in sorted(patcher.patches):
                path = key.removesuffix(".weight")
                yield prefix + path, patcher.model.get_submodule(path)

    def _inputs(self, width: int) -> torch.Tensor:
        """Numbers of the unit vectors: all, or as many as are asked for, the same each time."""
        if self._columns is None or self._columns >= width:
            return torch.arange(width)
        chosen = torch.randperm(width, generator=torch.Generator().manual_seed(SEED))[: self._columns]
        return chosen.sort().values

    def _answer(self, module: Any) -> torch.Tensor:  # noqa: ANN401
        """(vectors, out): what the layer makes of unit vectors."""
        weight = module.weight
        dtype = torch.float32 if self._cpu else weight.dtype
        chosen = self._inputs(weight.shape[1])
        parts = [chosen[:FEW], *chosen[FEW:].split(MANY)]
        answers = []
        for part in parts:
            x = torch.zeros(len(part), weight.shape[1], dtype=dtype)
            x[torch.arange(len(part)), part] = 1
            answers.append(module(x.to(weight.device)[None])[0].cpu())
        return torch.cat(answers)

    def _exact(self, name: str, module: Any, case: Case) -> tuple[torch.Tensor, torch.Tensor, float]:  # noqa: ANN401
        """(vectors, out), (vectors, out), number: the values, the sums of absolute terms, the norm of all dW."""
        weight = module.weight.detach().cpu().double()
        chosen = self._inputs(weight.shape[1])
        base = weight[:, chosen].T
        bias = module.bias.detach().cpu().double() if module.bias is not None else torch.zeros(weight.shape[0]).double()
        change, terms = torch.zeros_like(base), base.abs() + bias.abs()
        for index, strength in case:
            up, down = (self._factors[index][f"{name}.lora_{part}.weight"].double() for part in ("up", "down"))
            columns = down[:, chosen].T
            change += strength * (columns @ up.T)
            terms += abs(strength) * (columns.abs() @ up.abs().T)
        return base + bias + change, terms, float(change.norm())


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).digest()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints goes to the log
    asked = json.loads(sys.argv[1])
    with torch.inference_mode():  # as ComfyUI runs its nodes
        files = [Path(file) for file in asked["loras"]]
        model = Model(Path(asked["checkpoint"]), files, asked["cpu"], asked["columns"])
        for case in asked["cases"]:
            print(json.dumps(model.look(case)), file=answers, flush=True)


if __name__ == "__main__":
    main()

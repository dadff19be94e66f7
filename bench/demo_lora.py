"""The demo's LoRAs: one for each client, with random factors, in the three ways in which such files name their layers.

python -m bench.demo_lora /tmp/large.safetensors /tmp/loras 4
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RANK = 4
SIZE = 0.3
"""Of the update, against a weight that has just been made."""
LAYERS = ("attn", ".ff.", "proj_in", "proj_out", "conv1")
STYLES = {
    "kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
    "diffusers": ("unet.{name}.lora.down.weight", "unet.{name}.lora.up.weight"),
    "PEFT": ("base_model.model.{name}.lora_A.weight", "base_model.model.{name}.lora_B.weight"),
}


def style_of(number: int) -> str:
    """The style of the LoRA of client ``number``, from 0."""
    return list(STYLES)[number % len(STYLES)]


def path_of(folder: Path, number: int) -> Path:
    return folder / f"style-{number + 1}-{style_of(number).lower()}.safetensors"


def make(model: Path, folder: Path, number: int) -> Path:
    """Write the LoRA of client ``number`` for the UNet in ``model``; no two are alike. Returns its path."""
    import torch  # noqa: PLC0415 - the demo itself reads this module, and may have to say that there is no torch

    from bench.random_weights import Shapes, fill, write  # noqa: PLC0415

    with open(model, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    down, up = STYLES[style_of(number)]
    shapes: Shapes = {}
    for key, spec in header.items():
        name = key.removesuffix(".weight")
        if name == key or len(spec["shape"]) < 2 or not any(part in name for part in LAYERS):
            continue
        rows, *columns = spec["shape"]
        names = {"name": name, "flat": name.replace(".", "_")}
        shapes[down.format(**names)] = (RANK, *columns)
        shapes[up.format(**names)] = (rows, RANK, *[1] * (len(columns) - 1))

    def tensors() -> Iterator[torch.Tensor]:
        for place, (key, shape) in enumerate(shapes.items()):  # down and up by turns
            yield fill(key, shape, number) * (SIZE if place % 2 else 1.0)

    out = path_of(folder, number)
    write(out, shapes, torch.float16, tensors(), {"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_lora")
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int)
    args = parser.parse_args()
    for number in range(args.number):
        make(args.model, args.folder, number)


if __name__ == "__main__":
    main()

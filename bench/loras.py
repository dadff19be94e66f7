"""LoRA files with random factors that fit a given checkpoint.

Owns which layers are touched and how strongly; values and bytes are bench.random_weights'. Keys are in
ComfyUI's generic form (`diffusion_model.*`, `text_encoders.*`), which every architecture accepts.

    python -m bench.loras tiny.safetensors style.safetensors --rank 4 --strength 0.1
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.checkpoints import CheckpointError
from bench.random_weights import DTYPES, Shapes, fill, write

LAYERS = ("attn", "mlp", ".ff.", "linear1", "linear2")
# From the file's prefix to the key's; a file with one bare model in it has no prefix.
PREFIXES = {
    "model.diffusion_model.": "diffusion_model.",
    "cond_stage_model.": "text_encoders.clip_l.",
    "conditioner.embedders.0.": "text_encoders.clip_l.",  # SDXL; its other encoder has open_clip's names
    "text_encoders.": "text_encoders.",
    "text_model.": "text_encoders.clip_l.transformer.text_model.",
    "double_blocks.": "diffusion_model.double_blocks.",
    "single_blocks.": "diffusion_model.single_blocks.",
}


def _layers(base: str | Path, parts: tuple[str, ...]) -> dict[str, list[int]]:
    """Layer key -> shape of its weight, (out, in), read from the header alone."""
    with open(base, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    layers = {}
    for name, spec in header.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None or not name.endswith(".weight") or len(spec["shape"]) != 2:
            continue
        key = PREFIXES[prefix] + name.removeprefix(prefix).removesuffix(".weight")
        if any(layer in key for layer in LAYERS) and key.startswith(parts):
            layers[key] = list(spec["shape"])
    if not layers:
        raise CheckpointError(f"{base} has no attention or feed-forward layer under {' or '.join(parts)}")
    return layers


def make(
    base: str | Path,
    out: str | Path,
    *,
    rank: int = 4,
    strength: float = 0.1,
    dtype: str = "fp16",
    seed: int = 0,
    parts: tuple[str, ...] = ("diffusion_model.", "text_encoders."),
) -> Path:
    """Write a LoRA for every attention and feed-forward layer of `base`; returns its path.

    At `strength` 1 the update B A is about as large as a freshly made weight (both scale with fan-in).
    """
    shapes: Shapes = {}
    for key, (rows, columns) in _layers(base, parts).items():
        shapes[key + ".lora_down.weight"] = (rank, columns)
        shapes[key + ".lora_up.weight"] = (rows, rank)

    def tensors() -> Iterator[torch.Tensor]:
        for name, shape in shapes.items():
            factor = fill(name, shape, seed)  # fan-in scaled: the product B A keeps unit gain
            yield factor * strength if name.endswith("lora_up.weight") else factor

    about = {"format": "pt", "about": f"random LoRA: rank {rank}, strength {strength}, seed {seed}"}
    write(Path(out), shapes, DTYPES[dtype], tensors(), about)
    return Path(out)


def main(argv: list[str] | None = None) -> None:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.loras", description=about)
    parser.add_argument("base", type=Path, help="checkpoint that the LoRA is for")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--strength", type=float, default=0.1, help="size of the update against the weight")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    out = make(args.base, args.out, rank=args.rank, strength=args.strength, dtype=args.dtype, seed=args.seed)
    print(f"{out}: rank {args.rank}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

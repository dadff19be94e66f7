"""The demo's model: a Stable-Diffusion-like UNet with random weights, as large as this machine can show.

Owns the presets, the choice between them, and the file. The file carries its own configuration, so whoever has the
state dict and its metadata can build the network.

    python -m bench.demo_model large /tmp/large.safetensors
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_KEY = "unet"
"""Where in the file's metadata the network's configuration is."""

PROCESS_NBYTES = 600_000_000
"""What one Python process with torch and diffusers takes beside the weights, activations included; generous."""
RAM_SHARE = 0.7
"""How much of the free RAM the demo may fill: others live here, too."""
_MARGIN_NBYTES = 8 << 20


class DemoError(Exception):
    """The demo cannot run here, or something in it failed; the message says what to do."""


@dataclass(frozen=True)
class Preset:
    """``nbytes`` of float32 weights; ``channels`` per level, ``context`` width of the prompt's vectors."""

    name: str
    nbytes: int
    channels: tuple[int, ...]
    context: int
    layers: int

    def shm_nbytes(self) -> int:
        return self.nbytes + _MARGIN_NBYTES

    def ram_nbytes(self, clients: int) -> int:
        """At worst, without sharing: every client's copy, and the file in the page cache."""
        return (clients + 1) * self.nbytes + clients * PROCESS_NBYTES

    def config(self) -> dict[str, Any]:
        """What diffusers builds the network from."""
        levels = len(self.channels) - 1
        return {
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": self.channels,
            "layers_per_block": self.layers, "cross_attention_dim": self.context, "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
        }  # fmt: skip


PRESETS = (
    Preset("large", 1_256_560_912, (192, 384, 768, 768), 768, 2),
    Preset("medium", 558_720_528, (128, 256, 512, 512), 512, 2),
    Preset("small", 211_790_608, (96, 192, 384, 384), 384, 1),
    Preset("tiny", 35_939_344, (64, 128, 192), 256, 1),
)
"""Largest first."""


def choose(free_shm: int, free_ram: int, free_disk: int, clients: int) -> Preset:
    """The largest that fits. Raises DemoError with the sizes needed and free."""
    for preset in PRESETS:
        fits_ram = preset.ram_nbytes(clients) <= RAM_SHARE * free_ram
        if preset.shm_nbytes() <= free_shm and fits_ram and preset.nbytes + _MARGIN_NBYTES <= free_disk:
            return preset
    least = PRESETS[-1]
    raise DemoError(
        f"not even the smallest model fits: it needs {least.shm_nbytes() / 1e6:.0f} MB of /dev/shm "
        f"({free_shm / 1e6:.0f} MB are free), {least.ram_nbytes(clients) / RAM_SHARE / 1e6:.0f} MB of RAM "
        f"({free_ram / 1e6:.0f} MB are free) and {least.nbytes / 1e6:.0f} MB for the file "
        f"({free_disk / 1e6:.0f} MB are free in the temporary directory)"
    )


def by_name(name: str) -> Preset:
    return next(preset for preset in PRESETS if preset.name == name)


def config_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    return dict(json.loads(metadata[CONFIG_KEY]))


def make(preset: Preset, out: Path, seed: int = 0) -> None:
    """Write the file; diffusers' own initialisation, made from ``seed``."""
    import torch  # noqa: PLC0415 - this module is read by processes that need none of the three
    from diffusers import UNet2DConditionModel  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**preset.config())
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(preset.config())}
    save_file(unet.state_dict(), str(out), metadata)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_model")
    parser.add_argument("preset", choices=[preset.name for preset in PRESETS])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    make(by_name(args.preset), args.out)


if __name__ == "__main__":
    main()

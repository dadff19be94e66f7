"""LoRA files as their users have them: made by peft and lycoris-lora where these make such files, by hand elsewhere.

    files = make_all("flux-tiny", checkpoint, folder)      # {name: LoraFile}

Owns which files there are; the names are known without importing anything heavy. Every file changes what it touches by
far more than rounding, and touches nothing that its architecture lacks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.comfy.lora_files import by_hand, by_lycoris, by_peft

Maker = Callable[[Path, Path], int]
"""(checkpoint, file to write) -> how many weights and biases the file patches."""

FILES: dict[str, dict[str, Maker]] = {
    arch: {**by_peft.FILES[arch], **by_lycoris.FILES[arch], **by_hand.FILES[arch]}
    for arch in ("sd15-tiny", "sd3-tiny", "flux-tiny")
}


STACKS = {
    "sd15-tiny": (
        "peft LoRA, kohya keys", "lycoris LoHa", "lycoris DoRA of outputs", "lycoris LoKr", "lycoris GLoRA",
        "lycoris OFT", "lycoris LoCon in Tucker form", "lycoris LoRA and norms", "differences and replacements",
        "peft LoRA, kohya keys",
    ),
    "sd3-tiny": (
        "peft LoRA, diffusers keys", "lycoris OFT, native names", "lycoris LoKr, diffusers names",
        "lycoris DoRA of outputs, diffusers names", "peft LoHa, PEFT keys", "a difference that is turned",
    ),
    "flux-tiny": (
        "peft LoRA, diffusers keys", "lycoris DoRA of inputs, native names", "lycoris BOFT, native names",
        "lycoris LoKr, diffusers names", "peft DoRA, diffusers keys", "lycoris GLoRA, native names",
        "LoRA, fused q k v alone", "lycoris full, native names", "peft LoRA, diffusers keys",
    ),
}  # fmt: skip
"""Files to apply one on top of the other: every form that an update can take, and the same file twice."""

_MAKE_TIMEOUT_S = 250
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class LoraFile:
    path: Path
    patches: int
    """Weights and biases it patches, counted by its maker."""


def make_all(arch: str, base: Path, folder: Path) -> dict[str, LoraFile]:
    """Every file for one architecture, in ``folder``; ``base`` is the checkpoint they are for.

    In a process of its own: the makers' libraries are large, and change each other's settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __name__, arch, str(base), str(folder)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_MAKE_TIMEOUT_S, check=False)
    assert done.returncode == 0, f"making LoRAs for {arch}: exit {done.returncode}\n{done.stderr[-4000:]}"
    made = json.loads(done.stdout.splitlines()[-1])
    return {name: LoraFile(Path(path), patches) for name, (path, patches) in made.items()}

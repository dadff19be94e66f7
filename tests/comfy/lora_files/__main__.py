"""``python -m tests.comfy.lora_files ARCH CHECKPOINT FOLDER``: makes the files, prints {name: [path, patches]} last."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.comfy.lora_files import FILES


def main(arch: str, base: str, folder: str) -> None:
    made = {}
    for seed, (name, maker) in enumerate(FILES[arch].items()):
        path = Path(folder) / f"{name.replace(',', '').replace(' ', '-')}.safetensors"
        torch.manual_seed(seed)
        made[name] = (str(path), maker(Path(base), path))
    print(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])

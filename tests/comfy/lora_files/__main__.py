"""``python -m tests.comfy.lora_files ARCH CHECKPOINT FOLDER``: makes the files, prints {name: [path, patches]} last."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch

from tests.comfy.lora_files import FILES


def main(arch: str, base: str, folder: str) -> None:
    made = {}
    for name, maker in FILES[arch].items():
        path = Path(folder) / f"{name.replace(',', '').replace(' ', '-')}.safetensors"
        torch.manual_seed(zlib.crc32(name.encode()))  # whatever other files there are
        made[name] = (str(path), maker(Path(base), path))
    print(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])

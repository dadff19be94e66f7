"""A models folder in ComfyUI's layout: checkpoints, LoRAs, a checkpoint in parts, and files that a host must refuse.

Everything is made where it is first asked for. Checkpoints are those that the benchmarks keep (bench.workload), linked.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench import loras, workload
from bench.workflows import Lora

LORAS = ("character", "style", "light", "line")
"""Names without extension; each has a half for the model and one for the text encoder."""
STRENGTH, RANK = 0.2, 4
"""Of an update against the weight that it changes. Small: the pictures are of random weights, and stay pictures."""

_PARTS = {
    "diffusion_models": "model.diffusion_model.",
    "text_encoders": "cond_stage_model.transformer.",
    "vae": "first_stage_model.",
}


class Models:
    """``folder`` is laid out as ComfyUI's models folder; ``roots`` is what a host has to be allowed to open."""

    def __init__(self, folder: Path, arch: str, comfy: Path) -> None:
        self.folder, self._arch, self._comfy = folder, arch, comfy
        for kind in ("checkpoints", "loras", *_PARTS):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        self._elsewhere = folder.parent / "elsewhere"
        self.name = self.checkpoint(arch)
        for seed, lora in enumerate(LORAS):
            loras.make(self.path(self.name), folder / "loras" / _file(lora), rank=RANK, strength=STRENGTH, seed=seed)

    @property
    def roots(self) -> list[Path]:
        """Links are followed before a host looks whether it may."""
        linked = {(self.folder / "checkpoints" / name).resolve().parent for name in self._linked}
        return [self.folder.resolve(), *sorted(linked)]

    @property
    def folders(self) -> list[Path]:
        """For a server: it also lists what the host must not open."""
        (self._elsewhere / "checkpoints").mkdir(parents=True, exist_ok=True)
        return [self.folder, self._elsewhere]

    def path(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def checkpoint(self, arch: str) -> str:
        """Its name, as a loader node lists it."""
        link = self.path(f"{arch}.safetensors")
        if not link.exists():
            link.symlink_to(workload.made(arch, "fp16", self._comfy).resolve())
        return link.name

    @property
    def _linked(self) -> list[str]:
        return [file.name for file in (self.folder / "checkpoints").iterdir() if file.is_symlink()]

    def lora(self, name: str) -> Path:
        return self.folder / "loras" / _file(name)

    def parts(self) -> dict[str, str]:
        """SD1.5 of one level as three files: folder -> name."""
        whole = self.path(self.checkpoint("sd15-tiny"))
        for kind, prefix in _PARTS.items():
            out = self.folder / kind / _file("part")
            if not out.exists():
                with safe_open(whole, framework="pt") as file:
                    names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no dict
                    save_file({name.removeprefix(prefix): file.get_tensor(name) for name in names}, out)
        return dict.fromkeys(_PARTS, _file("part"))

    # -- what a host refuses, and ComfyUI loads all the same ---------------------------------------------------------

    def pickle(self) -> str:
        """The checkpoint in a format that no host opens."""
        out = self.path("pickle.ckpt")
        if not out.exists():
            torch.save({"state_dict": load_file(self.path(self.name))}, out)
        return out.name

    def outside(self) -> str:
        """A copy outside the host's roots."""
        out = self.folders[1] / "checkpoints" / "outside.safetensors"
        if not out.exists():
            shutil.copy(self.path(self.name), out)
        return out.name

    def oversized(self, nbytes: int) -> str:
        """The checkpoint with one more tensor, which nobody needs, so that the file has ``nbytes``.

        It takes no room on the disk: the tensor is a hole. Nor in ComfyUI, which maps the file and reads what it needs;
        it must be smaller than all RAM for that.
        """
        out = self.path("oversized.safetensors")
        if out.exists():
            return out.name
        with open(self.path(self.name), "rb") as source, open(out, "wb") as file:
            header = json.loads(source.read(struct.unpack("<Q", source.read(8))[0]))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            header["unused.padding"] = {"dtype": "U8", "shape": [nbytes - end], "data_offsets": [end, nbytes]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, file)
            file.truncate(8 + len(text) + nbytes)
        return out.name


def _file(name: str) -> str:
    return f"{name}.safetensors"


def stack(*entries: tuple[str, float] | tuple[str, float, float]) -> tuple[Lora, ...]:
    """``("style", 0.8)`` has the same strength for model and text encoder."""
    return tuple((_file(name), model, clip[0] if clip else model) for name, model, *clip in entries)

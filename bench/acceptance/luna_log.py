"""What the Luna nodes and the extension wrote into a server's log since a moment: the lines that users look for.

Owns the lines' form; judges nothing. Patterns are of whole lines' ends, so a line with more or less in it is not found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.comfy_server import ComfyServer

_UNITS = {"GB": 1e9, "MB": 1e6}
_SIZE = r"([\d.]+) (GB|MB)"
_SHARED = re.compile(
    rf"\[LunaModelRouter\] ✓ (MODEL|CLIP|VAE) (.+?): {_SIZE} from the host at (\S+) \((\w[\w-]*), ([^)]+)\), "
    rf"{_SIZE} private; daemon_mode (\w+)$"
)
_LOCAL = re.compile(r"\[LunaModelRouter\] (⚠ )?(MODEL|CLIP|VAE) (.+?): local(?:: (.+))?; daemon_mode (\w+)$")
_LORA = re.compile(
    r"\[LunaConfigGateway\] LoRA '(.+?)' -> MODEL (shared|local) \((\S+)\), CLIP (shared|local) \((\S+)\); "
    r"stack size (\d+)$"
)
_MISSING = re.compile(r"\[LunaConfigGateway\] Warning: LoRA '(.+?)' not found, skipped$")
_ATTACHED = re.compile(rf"\[lunashm\] attached (.+?): (\d+) tensors, {_SIZE} shared, {_SIZE} private$")


@dataclass(frozen=True)
class Shared:
    """``✓ MODEL sd15.safetensors: 1.72 GB from the host at ipc:... (posix, cpu), 0.1 MB private; daemon_mode auto``."""

    what: str
    name: str
    nbytes: float
    endpoint: str
    rung: str
    device: str
    private_nbytes: float
    mode: str


@dataclass(frozen=True)
class Local:
    """``⚠ MODEL sd15.safetensors: local: no lunashm host at ...; daemon_mode auto``"""

    warned: bool
    what: str
    name: str
    reason: str
    mode: str


@dataclass(frozen=True)
class Applied:
    """``LoRA 'style.safetensors' -> MODEL shared (0.8), CLIP local (0.8); stack size 1``"""

    name: str
    model_to: str
    model_strength: float
    clip_to: str
    clip_strength: float
    size: int

    @property
    def places(self) -> tuple[str, str]:
        return self.model_to, self.clip_to


@dataclass(frozen=True)
class Attached:
    """``attached sd15.safetensors: 1130 tensors, 4.02 GB shared, 1.2 MB private``"""

    name: str
    tensors: int
    nbytes: float
    private_nbytes: float


class LunaLog:
    """From the moment it is made."""

    def __init__(self, server: ComfyServer) -> None:
        self._server = server
        self._seen = len(server.log_text())

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._server.log_text()[self._seen :].splitlines()]

    def shared(self) -> list[Shared]:
        return [
            Shared(what, name, _nbytes(size, unit), where, rung, device, _nbytes(own, own_unit), mode)
            for what, name, size, unit, where, rung, device, own, own_unit, mode in self._all(_SHARED)
        ]

    def local(self) -> list[Local]:
        return [Local(bool(sign), what, name, why, mode) for sign, what, name, why, mode in self._all(_LOCAL)]

    def applied(self) -> list[Applied]:
        return [
            Applied(name, model_to, float(model), clip_to, float(clip), int(size))
            for name, model_to, model, clip_to, clip, size in self._all(_LORA)
        ]

    def missing(self) -> list[str]:
        return [name for (name,) in self._all(_MISSING)]

    def attached(self) -> list[Attached]:
        return [
            Attached(name, int(tensors), _nbytes(size, unit), _nbytes(own, own_unit))
            for name, tensors, size, unit, own, own_unit in self._all(_ATTACHED)
        ]

    def warned_of(self, name: str) -> list[str]:
        """The extension's lines that say why a file is loaded locally."""
        start = f"[lunashm] {name} is loaded locally"
        return [line[line.index(start) :] for line in self.lines if start in line]

    def _all(self, pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
        return [match.groups("") for line in self.lines if (match := pattern.search(line)) is not None]


def _nbytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]

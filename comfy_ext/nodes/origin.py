"""Where a MODEL, CLIP or VAE has its weights from, in words. Needs no lunashm: without it everything is local."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import asking
from ..units import size

_NOT_ASKED_FOR = "its loader does not take it from one safetensors file"


@dataclass(frozen=True)
class Origin:
    """``shared_nbytes`` and ``private_nbytes`` of the parameters, ``where`` they are lent; ``reason`` where local."""

    shared: bool
    where: str = ""
    shared_nbytes: int = 0
    private_nbytes: int = 0
    reason: str = ""

    def __str__(self) -> str:
        """``1.72 GB from the host at ipc:///... (posix, cpu), 0.1 MB private`` or ``local: no host at ...``."""
        if self.shared:
            return f"{size(self.shared_nbytes)} from {self.where}, {size(self.private_nbytes)} private"
        return f"local: {self.reason}" if self.reason else "local"


def is_shared(holder: Any) -> bool:
    """Whether a MODEL, CLIP or VAE shows memory of a host."""
    return origin_of(holder).shared


def origin_of(holder: Any, reasons: Mapping[str, str] | None = None) -> Origin:
    """Of a MODEL, CLIP or VAE; ``reasons`` as ``Asking`` collected them while it was loaded."""
    binding = _binding(holder)
    if binding is None or not binding.files:
        said = dict.fromkeys((reasons or {}).values())
        return Origin(False, reason=asking.unavailable or "; ".join(said) or _NOT_ASKED_FOR)
    where = "; ".join(dict.fromkeys(file.lender for file in binding.files))
    return Origin(True, where, binding.shared_nbytes, binding.private_nbytes)


def _binding(holder: Any) -> Any:
    if asking.unavailable:
        return None
    from ..binding import binding_of  # noqa: PLC0415 - needs lunashm

    patcher = getattr(holder, "patcher", None) or holder  # CLIP and VAE have one, a MODEL is one
    return binding_of(getattr(patcher, "model", None))

"""What one LoRA does to one weight: its factors and strength as terms of a low-rank update. Knows no module."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lunashm.client.lora_file import Factors
from lunashm.client.lowrank import Update
from lunashm.errors import LoraMismatch

EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Term:
    """``scale`` is alpha / rank; ``path`` is for messages. Each is one of a kind: the same LoRA twice is two terms."""

    path: str
    factors: Factors
    scale: float
    strength: float

    def add_to(self, update: Update, weight: torch.Tensor) -> None:
        """Let ``update``, which ``weight`` (out, in, *kernel) has had so far, do this, too.

        Raises LoraMismatch naming file, key and both shapes; UnsupportedLayer.
        """
        up, down = self._matrices(weight.shape)
        if self.strength == 0.0:
            return
        if self.factors.magnitude is None:
            update.add(up, down, self.strength * self.scale, owned=self.factors.mid is not None)
        else:
            magnitude = self.factors.magnitude.to(torch.float32)
            self._add_dora(update, weight, up.to(torch.float32), down.to(torch.float32), magnitude)

    def _matrices(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """up (out, r) and down (r, in * kernel) as the file has them, LoCon's ``mid`` folded into ``down``."""
        factors = self.factors
        up, down = factors.up.flatten(1), factors.down
        if factors.mid is not None:
            down = torch.einsum("pq...,qi->pi...", factors.mid.to(torch.float32), down.to(torch.float32).flatten(1))
        pointwise = all(size == 1 for size in down.shape[2:])  # a Linear's on a 1x1 convolution, or the reverse
        fits = down.shape[1:] == shape[1:] or (pointwise and down[0].numel() == shape[1:].numel())
        if not fits or up.shape[0] != shape[0]:
            shapes = f"{list(up.shape)} x {list(down.shape)}"
            raise self._mismatch(f"the factors of {factors.key}, {shapes},", shape)
        return up, down.flatten(1)

    def _add_dora(
        self, update: Update, weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, magnitude: torch.Tensor
    ) -> None:
        """W -> (1 - s) W + s e * (W + dW), e = magnitude / norm of W + dW: per output or per input.

        arXiv 2402.09353, as PEFT computes it at strength 1; other strengths go so much of the way from W to there.
        """
        s, factor = self.strength, self.strength * self.scale
        after = update.apply_to(weight.detach().cpu())  # where the factors are
        after += ((up * self.scale) @ down).reshape(after.shape)
        rows, columns = after.shape[:2]
        if magnitude.shape[0] == magnitude.numel() == rows:
            e = magnitude.flatten() / (after.flatten(1).norm(dim=1) + EPSILON)  # (out,)
            update.scale_rows((1.0 - s) + s * e)
            update.add(up * e[:, None], down, factor, owned=True)
        elif magnitude.shape[0] == 1 and magnitude.numel() == columns:
            e = magnitude.flatten() / (after.transpose(0, 1).flatten(1).norm(dim=1) + EPSILON)  # (in,)
            update.scale_columns((1.0 - s) + s * e)
            scaled = down.reshape(-1, columns, down.shape[1] // columns) * e[:, None]
            update.add(up, scaled.flatten(1), factor, owned=True)
        else:
            magnitudes = f"the DoRA magnitudes of {self.factors.key}, {list(magnitude.shape)},"
            raise self._mismatch(magnitudes, weight.shape)

    def _mismatch(self, what: str, shape: torch.Size) -> LoraMismatch:
        return LoraMismatch(f"{self.path}: {what} do not fit a weight of {list(shape)}; it is for another model")

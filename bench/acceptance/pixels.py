"""How far two pictures are apart, and how far they may be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.gpu.lora_pictures import psnr

Pixels = NDArray[np.uint8]

ROUNDING_LEVELS = 2
"""Of 255: how far a picture with LoRAs may be from stock's in float32, as README states it."""
ROUNDING_DB = 35.0
"""PSNR against stock's picture in half precision, where stock rounds its merged weights and nothing is stated yet."""


def levels(ours: Pixels, theirs: Pixels) -> int:
    """The largest difference of a value, of 255; 255 for pictures of two sizes."""
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max()) if ours.shape == theirs.shape else 255


def distance(ours: Pixels, theirs: Pixels) -> float:
    """Root mean square, in levels of 255."""
    return float(np.sqrt(((ours.astype(float) - theirs.astype(float)) ** 2).mean()))


def within_rounding(ours: Pixels, theirs: Pixels, float32: bool) -> bool:
    """Whether it is stock's picture."""
    if float32:
        return levels(ours, theirs) <= ROUNDING_LEVELS
    return ours.shape == theirs.shape and psnr(ours.astype(float), theirs.astype(float)) >= ROUNDING_DB

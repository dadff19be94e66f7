"""Figures as people read them."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """``4.27 GB`` or ``3.2 MB``."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def progress(done: int, total: int, elapsed_s: float) -> str:
    """``43% of 4.27 GB at 1.72 GB/s``."""
    speed = f" at {done / 1e9 / elapsed_s:.2f} GB/s" if elapsed_s > 0 else ""
    return f"{100 * done // max(total, 1)}% of {size(total)}{speed}"

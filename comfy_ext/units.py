"""Figures as people read them."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """``4.27 GB`` or ``3.2 MB``."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"

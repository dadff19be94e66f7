"""placeholder"""
from __future__ import annotations
def checkout():
    return None

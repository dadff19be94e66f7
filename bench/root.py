"""Where the project lies. Imports nothing: what starts processes need not wait for torch."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

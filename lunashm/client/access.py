"""What the client can add to a refused path. It runs as the user who asks, so it may say what the host must not."""

from __future__ import annotations

import os
from pathlib import Path

from lunashm.errors import LunashmError, ModelNotFound, PathNotAllowed


def explained(refusal: PathNotAllowed, path: str) -> LunashmError:
    """The host's refusal of ``path`` with the cause seen from here: no such file, or a link out of the roots."""
    try:
        real = Path(os.path.realpath(path))
        if not real.exists():
            return ModelNotFound(f"no such file: {path}")
    except (OSError, ValueError):
        return refusal  # no path at all, which is what the refusal says
    if str(real) != os.path.normpath(path):
        return PathNotAllowed(
            f"{path} links to {real}, which is outside the host's roots; "
            f"restart the host with --root {real.parent}, or add that to roots in lunashm.toml"
        )
    return refusal

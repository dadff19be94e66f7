"""What ComfyUI is to serve as its front end where none is installed: nobody looks at it, but it has to be there."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "COMFYUI_FRONT_END_ROOT"
"""Names a folder with an index.html that is taken in any case."""
PACKAGE = "comfyui_frontend_package"


def root(python: str, base: Path) -> Path | None:
    """The folder for ``--front-end-root``, an empty one below `base` if need be; None where ComfyUI has its own."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().resolve()
    if python != sys.executable or importlib.util.find_spec(PACKAGE) is not None:
        return None
    empty = base / "front_end"
    empty.mkdir(exist_ok=True)
    (empty / "index.html").write_text("<!doctype html><title>no front end is installed</title>")
    return empty

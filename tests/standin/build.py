"""Builds the stand-in libraries once for their sources, and says how a process is started with them."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
_ROOT = _SOURCES.parent.parent
LIBRARY = "libcuda.so.1"
NVML = "libnvidia-ml.so.1"


def folder() -> Path:
    """Where ``libcuda.so.1`` lies."""
    return _built(LIBRARY, _SOURCES)


def nvml_folder() -> Path:
    """Where ``libnvidia-ml.so.1`` lies; a process on the stand-in driver has none unless it is told of this one."""
    return _built(NVML, _SOURCES / "nvml")


@functools.cache
def _built(library: str, folder: Path) -> Path:
    """Fails, rather than skips, without a C compiler: these tests are part of the core."""
    sources = sorted(folder.glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"lunashm-standin-{os.getuid()}-{digest}"
    if not (target / library).is_file():
        _build([source for source in sources if source.suffix == ".c"], target, library)
    return target


def _build(sources: list[Path], target: Path, library: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("tests of the GPU rungs build a stand-in driver, and there is no C compiler: install gcc")
    made = Path(tempfile.mkdtemp(prefix=f"{target.name}-"))
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{library}"]
    subprocess.run([compiler, *flags, "-o", made / library, *sources, "-lpthread", "-ldl"], check=True)
    try:
        made.rename(target)  # whole, or not at all
    except OSError:  # another process was faster
        shutil.rmtree(made)


def environment(*, nvml: bool = False, **variables: str | None) -> dict[str, str]:
    """For a process that is to meet the stand-in driver, and that of NVML if ``nvml``.

    ``variables`` on top of this process's own; None removes one.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    paths = [str(folder()), *([str(nvml_folder())] if nvml else []), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    inherited |= {"LD_LIBRARY_PATH": ":".join(paths), "PYTHONPATH": str(_ROOT)}
    merged = {**inherited, **variables}
    return {name: value for name, value in merged.items() if value is not None}

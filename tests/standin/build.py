"""Builds the stand-in libraries once for their sources, and says how a process is started with them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
_ROOT = _SOURCES.parent.parent
_ACCELERATOR = _SOURCES / "accelerator"
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
    compiler = shutil.which("cc") or shutil.which("gcc")
    flags = ["-Wextra", "-Werror", f"-Wl,-soname,{library}", "-lpthread", "-ldl"]
    return _made(library, sources, compiler, flags, "a stand-in driver, and there is no C compiler: install gcc")


@functools.cache
def _accelerator() -> Path:
    """The stand-in accelerator's library, for the torch that is installed; it takes some 10 s to build."""
    torch = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
    version = importlib.metadata.version("torch")
    headers = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    flags = ["-std=c++17", "-Wno-sign-compare", *(f"-I{folder}" for folder in headers)]
    flags += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{torch / 'lib'}"]
    sources = sorted([*_ACCELERATOR.glob("*.cpp"), *_ACCELERATOR.glob("*.h")])
    missing = "a stand-in accelerator, and there is no C++ compiler: install g++"
    return _made("npu.so", sources, shutil.which("g++"), flags, missing, version) / "npu.so"


def _made(
    library: str, sources: list[Path], compiler: str | None, flags: list[str], missing: str, version: str = ""
) -> Path:
    """The folder of ``library``, built if it was not yet for these sources and this ``version``."""
    contents = b"".join(source.read_bytes() for source in sources)
    digest = hashlib.sha256(contents + version.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"lunashm-standin-{os.getuid()}-{digest}"
    if (target / library).is_file():
        return target
    if compiler is None:
        raise RuntimeError(f"tests of the GPU rungs build {missing}")
    made = Path(tempfile.mkdtemp(prefix=f"{target.name}-"))
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", made / library]
    subprocess.run([*command, *(source for source in sources if source.suffix != ".h"), *flags], check=True)
    try:
        made.rename(target)  # whole, or not at all
    except OSError:  # another process was faster
        shutil.rmtree(made)
    return target


def environment(*, nvml: bool = False, accelerator: bool = False, **variables: str | None) -> dict[str, str]:
    """For a process that is to meet the stand-in driver, and that of NVML if ``nvml``.

    ``accelerator``: torch has a device on its memory, once ``torch_npu`` is imported; ComfyUI does.

    ``variables`` on top of this process's own; None removes one.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    paths = [str(folder()), *([str(nvml_folder())] if nvml else []), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    modules = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if accelerator:
        modules.insert(0, str(_ACCELERATOR))
        inherited["LUNASHM_STANDIN_ACCELERATOR"] = str(_accelerator())
    inherited |= {"LD_LIBRARY_PATH": ":".join(paths), "PYTHONPATH": os.pathsep.join(modules)}
    merged = {**inherited, **variables}
    return {name: value for name, value in merged.items() if value is not None}

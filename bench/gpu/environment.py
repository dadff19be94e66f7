"""The machine as ``lunashm doctor`` and nvidia-smi see it: driver, compute mode, MIG, MPS, namespaces, limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.part import Context, Measured
from bench.report import Figure
from bench.root import ROOT

_ASK_S = 120
_QUERY = (
    "name,uuid,driver_version,memory.total,memory.used,compute_mode,mig.mode.current,persistence_mode,"
    "pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max,clocks.max.mem,ecc.mode.current"
)


def run(context: Context) -> Measured:
    doctor = _ask([sys.executable, "-m", "lunashm", "doctor", "--json", "--device", context.device])
    facts: dict[str, Any] = {"doctor exit code": doctor["code"]}
    failed = 0
    try:
        said = json.loads(doctor["out"])
    except ValueError:
        facts["doctor"] = doctor
    else:
        failed = sum(check["state"] == "fail" for check in said["checks"])
        for check in said["checks"]:
            facts[f"doctor: {check['name']}"] = f"{check['state']}: {check['detail']}"
    facts |= _smi() | _container()
    return Measured([Figure("doctor: checks that fail", failed, "checks")], {}, facts)


def _smi() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not installed"}
    asked = _ask(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"])
    found: dict[str, Any] = {"nvidia-smi": asked["err"] or asked["out"]}
    for line in asked["out"].strip().splitlines():
        values = [value.strip() for value in line.split(",")]
        found[f"nvidia-smi: {values[0]}"] = dict(zip(_QUERY.split(","), values, strict=False))
    found["nvidia-smi topo"] = _ask(["nvidia-smi", "topo", "-m"])["out"]
    return found


def _container() -> dict[str, Any]:
    namespaces = Path("/proc/self/ns")
    found: dict[str, Any] = {f"namespace {name}": str((namespaces / name).readlink()) for name in ("pid", "ipc")}
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max", "/proc/driver/nvidia/version"):
        try:
            with open(file) as opened:
                found[file] = opened.read().strip()
        except OSError as exc:
            found[file] = exc.strerror
    status = os.statvfs("/dev/shm")
    found["/dev/shm, bytes"] = status.f_blocks * status.f_frsize
    found["variables"] = {name: os.environ[name] for name in os.environ if name.startswith(("CUDA_", "NVIDIA_"))}
    return found


def _ask(command: list[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_ASK_S)
    except subprocess.TimeoutExpired:
        return {"code": None, "out": "", "err": f"no answer in {_ASK_S} s"}
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr[-1000:]}

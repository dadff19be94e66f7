"""What the GPU suite asks of a machine with a GPU, held against stand-ins: MPS's control command and NVML."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bench.gpu import memory_modes
from bench.gpu.mps import Mps, MpsUnavailable
from tests.bench.gpu_steps import dry, run, values
from tests.standin.peers import GPUS
from tests.standin.process import Process

GB = 10**9

# -- the service of many processes -------------------------------------------------------------------------------------

CONTROL = """#!/bin/sh
test "$1" = -d && {{ echo started >>{said}; exit {status}; }}
read command
echo "$command $CUDA_MPS_PIPE_DIRECTORY" >>{said}
test "$command" = get_server_list && echo 4711
exit 0
"""


def control(folder: Path, status: int = 0) -> tuple[str, Path]:
    """A program that stands in for the control command, and the file it writes what it was told into."""
    program, said = folder / "nvidia-cuda-mps-control", folder / "said"
    program.write_text(CONTROL.format(said=said, status=status))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program), said


def test_mps_is_stopped_whatever_happens_and_leaves_nothing(tmp_path: Path) -> None:
    program, said = control(tmp_path)
    with pytest.raises(ZeroDivisionError), Mps(program) as service:
        pipe = Path(service.environment["CUDA_MPS_PIPE_DIRECTORY"])
        assert pipe.is_dir()
        assert service.servers() == [4711]
        raise ZeroDivisionError
    lines = said.read_text().splitlines()
    assert lines[0] == "started"
    assert lines[-1] == f"quit -t 5 {pipe}"
    assert not pipe.parent.exists()


def test_mps_that_cannot_start_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = control(tmp_path, status=3)
    with pytest.raises(MpsUnavailable, match="-d ended with 3"), Mps(program):
        pass
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found = memory_modes.mps(dry(tmp_path))
    assert found.figures == []
    assert "not installed" in found.notes[0]


@pytest.mark.comfy
def test_mps_step_measures_servers_while_the_service_runs(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said = control(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(memory_modes, "KINDS", ("stock",))
    found = run(memory_modes.PART, "mps", scratch)
    assert values(found)["with MPS: stock, N=1: all rendering at once"] > 0
    assert all(figure.target is None for figure in found.figures)
    assert said.read_text().splitlines()[-1].startswith("quit")


# -- the device's memory -----------------------------------------------------------------------------------------------

METER = """
import os, pathlib
from bench.gpu.device_memory import Meter, Watch
from bench.gpu.part import Context
meter = Meter(Context("cuda:1", False, pathlib.Path("."), None))

def peak_while(name, values):
    import time
    with Watch(meter) as watch:
        for value in values:
            os.environ[name] = value
            seen = len(watch.samples)
            while len(watch.samples) < seen + 2:
                time.sleep(0.001)
    return watch.peak, watch.rate_hz
"""


def test_the_whole_device_is_watched_and_the_peak_is_kept() -> None:
    name = "LUNASHM_STANDIN_NVML_USED"
    with Process(nvml=True, **{name: "0=9000000000,1=7"}) as machine:
        machine(METER)
        assert len(GPUS) > 1
        assert machine("meter.read()") == 7
        assert machine("meter.total()") == 80 * GB
        peak, rate_hz = machine("peak_while(name, ['1=5', '1=80', '1=6'])", name=name)
        assert (peak, machine("meter.read()")) == (80, 6)
        assert rate_hz > 20


def test_what_cannot_be_read_is_an_error_and_not_a_zero() -> None:
    with Process(nvml=True, LUNASHM_STANDIN_NVML_USED="1=7") as machine:
        machine(METER)
        machine("os.environ[name] = value", name="LUNASHM_STANDIN_NVML_FAIL", value="nvmlDeviceGetMemoryInfo=3")
        failed = "try:\n    meter.read()\nexcept Exception as exc:\n    said = str(exc)\nsaid"
        assert "Not Supported" in machine(failed)

"""GPUs as the real cuda-bindings see them on the stand-in driver, in the process that ``apart`` starts."""

from __future__ import annotations

import pytest

from lunashm.cli.checks import apart, gpu, mps
from lunashm.cli.checks.check import State, Wanted, run
from lunashm.memory.gpus import Gpu
from tests.standin import build
from tests.standin.peers import GPUS
from tests.standin.process import Process

A, B = GPUS
COMPUTE_MODE, VMM, VMM_FD = 20, 102, 103


@pytest.fixture
def standin(monkeypatch):
    """``standin(DEVICES=1)``: from now on, processes that are started meet the driver."""

    def start(**variables):
        changed = {f"LUNASHM_STANDIN_{name}": str(value) for name, value in variables.items()}
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in build.environment(**changed).items():
            monkeypatch.setenv(name, value)

    return start


def look(wanted=None):
    return {check.name: check for check in apart.run("gpu", wanted or Wanted())}


@pytest.fixture
def no_driver(monkeypatch):
    """Also where there is one."""
    monkeypatch.setattr(gpu.cuda, "installed", lambda: False)
    monkeypatch.setattr(gpu, "in_kernel", lambda root: False)


def test_a_machine_without_a_gpu_is_healthy_and_says_so_in_one_line(no_driver):
    (check,) = run(gpu.tasks(Wanted()))
    assert (check.state, check.detail) == (State.OK, "no NVIDIA driver: CPU memory only")


def test_a_machine_without_the_gpu_that_is_configured_is_not(no_driver):
    (check,) = run(gpu.tasks(Wanted("cuda:0")))
    assert check.state is State.FAIL
    assert "--device cpu" in check.fix


def names(place):
    return [place, f"{place} cuda-vmm", f"{place} cuda-ipc"]


def test_every_gpu_is_named_and_every_rung_of_it_tried(standin):
    standin()
    checks = look()
    assert list(checks) == ["GPU driver", "MPS", *names("cuda:0"), *names("cuda:1")]
    assert {check.state for check in checks.values()} == {State.OK}, checks
    assert f"Stand-in GPU 1, {B}, compute mode default, VMM with file descriptors" in checks["cuda:1"].detail
    assert "CUDA up to 13.0, cuda-bindings 1" in checks["GPU driver"].detail
    assert "round trip" in checks["cuda:0 cuda-ipc"].detail


@pytest.mark.parametrize("device", ["cuda:1", B[:12]])
def test_one_device_only(standin, device):
    standin()
    assert list(look(Wanted(device, only=True))) == ["GPU driver", "MPS", *names("cuda:1")]


def test_the_cpu_only_is_no_gpu(standin):
    standin()
    (check,) = look(Wanted("cpu", only=True)).values()
    assert check.state is State.SKIP


def test_a_device_that_is_not_there_fails_with_those_that_are(standin):
    standin(DEVICES=1)
    checks = look(Wanted("cuda:5", only=True))
    assert checks["device"].state is State.FAIL
    assert f"cuda:0, Stand-in GPU 0 ({A})" in checks["device"].detail
    assert "cuda:0" not in checks, "only the one that was asked for"


def test_a_gpu_without_descriptors_shares_by_ipc(standin):
    standin(DEVICES=1, ATTRIBUTES=f"{VMM_FD}=0", FAIL="cuMemCreate=801:1")
    checks = look(Wanted("cuda:0"))
    assert checks["cuda:0"].state is State.WARN
    assert "VMM without file descriptors" in checks["cuda:0"].detail
    assert checks["cuda:0 cuda-vmm"].state is State.WARN
    assert "CUDA_ERROR_NOT_SUPPORTED" in checks["cuda:0 cuda-vmm"].detail
    assert checks["cuda:0 cuda-ipc"].state is State.OK


@pytest.mark.parametrize(("device", "state"), [("cpu", State.WARN), ("cuda:0", State.FAIL), ("cuda:1", State.WARN)])
def test_a_gpu_that_cannot_share_fails_only_where_it_is_the_one_to_use(standin, device, state):
    standin(FAIL="cuMemCreate=801:1,cuIpcGetMemHandle=801:1")
    check = look(Wanted(device))["cuda:0 cuda-ipc"]
    assert check.state is state
    assert "memory of cuda:0 cannot be shared" in check.detail
    assert "lunashm serve --device cpu" in check.fix


@pytest.mark.parametrize(("mode", "said"), [(3, "one process at a time"), (2, "no process may use it")])
@pytest.mark.parametrize(("device", "state"), [("cpu", State.WARN), ("cuda:0", State.FAIL)])
def test_a_compute_mode_for_one_process_is_named_with_the_command_to_change_it(standin, mode, said, device, state):
    standin(DEVICES=1, ATTRIBUTES=f"{COMPUTE_MODE}={mode}")
    check = look(Wanted(device))["cuda:0"]
    assert check.state is state
    assert check.detail.endswith(said)
    assert check.fix == f"sudo nvidia-smi -i {A} -c DEFAULT"


def test_exclusive_mode_under_mps_is_how_mps_is_meant():
    exclusive = Gpu(0, A, "NVIDIA H100", mig=False, compute_mode="exclusive-process", vmm=True, vmm_fd=True)
    assert gpu.describe(exclusive, True, with_mps=True).state is State.OK
    assert gpu.describe(exclusive, True, with_mps=False).state is State.FAIL


def test_a_mig_instance_is_called_one(standin):
    standin(DEVICES=1, NAME="NVIDIA H100 MIG 1g.10gb", FAIL="cuIpcGetMemHandle=801:1")
    checks = look()
    assert A.replace("GPU", "MIG") in checks["cuda:0"].detail
    assert "CUDA IPC does not work between instances" in checks["cuda:0"].detail
    assert "CUDA IPC does not work between GPU instances" in checks["cuda:0 cuda-ipc"].detail
    assert "cuda-vmm works, so nothing is missing" in checks["cuda:0 cuda-ipc"].detail


@pytest.mark.parametrize(
    ("error", "fix"),
    [(803, "reboot"), (802, "nvidia-fabricmanager"), (805, "nvidia-cuda-mps-control"), (999, "nvidia-modprobe")],
)
def test_a_driver_that_cannot_be_used_is_named_with_what_helps(standin, error, fix):
    standin(FAIL=f"cuInit={error}:1")
    (check,) = look().values()
    assert check.state is State.WARN
    assert "cuInit failed: CUDA_ERROR_" in check.detail
    assert fix in check.fix
    assert look(Wanted("cuda:0"))["GPU driver"].state is State.FAIL


ASK = "l = gpu.Look(Wanted(device), Path(root)); c = l.driver(); (c.state.value, c.detail, c.fix)"
SETUP = "from pathlib import Path; from lunashm.cli.checks import gpu; from lunashm.cli.checks.check import Wanted"


@pytest.fixture
def root(tmp_path):
    """A system with the driver's kernel module."""
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: NVIDIA Kernel Module  550.54.15  Tue Mar 5\n")
    return tmp_path


def test_hidden_gpus_are_no_fault_unless_one_is_to_be_used(root):
    with Process(CUDA_VISIBLE_DEVICES="") as process:
        process(SETUP)
        assert process(ASK, device="cpu", root=str(root))[0] == "ok"
        state, detail, fix = process(ASK, device="cuda:0", root=str(root))
        assert (state, fix) == ("fail", "unset CUDA_VISIBLE_DEVICES")
        assert detail.startswith("550.54.15, but this process sees no NVIDIA GPU")


def test_a_driver_without_gpus_is_a_warning_and_a_library_without_a_driver_is_nothing(root):
    with Process(LUNASHM_STANDIN_DEVICES="0") as process:
        process(SETUP)
        assert process(ASK, device="cpu", root=str(root))[0::2] == ("warn", "nvidia-smi")
        assert process(ASK, device="cpu", root=str(root / "none"))[1] == "no NVIDIA driver: CPU memory only"


def test_a_driver_without_bindings_needs_the_extra(root):
    (root / "cuda").mkdir()
    (root / "cuda" / "__init__.py").touch()  # no bindings in this one
    with Process(PYTHONPATH=f"{root}:{build.environment()['PYTHONPATH']}") as process:
        process(SETUP)
        assert process(ASK, device="cpu", root=str(root))[0::2] == ("warn", "python -m pip install 'lunashm[cuda]'")
        assert process(ASK, device="cpu", root=str(root / "none"))[0] == "ok", "and no GPU"


def test_device_files_that_are_closed_to_this_user_are_the_reason(root, monkeypatch):
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    assert gpu.permission(root) == ""
    monkeypatch.setattr(gpu.os, "access", lambda path, mode: False)
    assert gpu.permission(root).startswith(f"sudo usermod -aG $(stat -c %G {root}/dev/nvidia0)")


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.51  Release Build", "575.51"),
        ("NVRM version: of a new kind", "of an unknown release"),
    ],
)
def test_a_kernel_module_without_its_library_is_a_container_without_gpus(root, monkeypatch, line, release):
    (root / "proc/driver/nvidia/version").write_text(f"{line}\nGCC version: gcc 12\n")
    monkeypatch.setattr(gpu.cuda, "installed", lambda: False)
    check = gpu.Look(Wanted(), root).driver()
    assert check.state is State.WARN
    assert f"in the kernel ({release})" in check.detail
    assert "--gpus all" in check.fix


# -- MPS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def proc(tmp_path):
    for pid, name in (("1", "init"), ("77", "nvidia-cuda-mps-control"[:15])):
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "comm").write_text(f"{name}\n")
    return tmp_path / "proc"


def test_mps_is_recognised_by_its_daemon_and_its_pipes(proc, tmp_path):
    pipes = tmp_path / "mps"
    nobody = tmp_path / "nobody"
    assert mps.look(nobody, {}, pipes).state is State.OK
    elsewhere = mps.look(proc, {}, pipes)
    assert elsewhere.state is State.WARN
    assert "CUDA_MPS_PIPE_DIRECTORY" in elsewhere.fix
    pipes.mkdir()
    (pipes / "control").touch()
    for check in (mps.look(proc, {}, pipes), mps.look(proc, {"CUDA_MPS_PIPE_DIRECTORY": str(pipes)}, nobody)):
        assert check.state is State.WARN
        assert "a control daemon runs" in check.detail
        assert "ends all of them" in check.detail
    assert "of another container, or one that ended" in mps.look(nobody, {}, pipes).detail

"""Which GPU is meant, and what a process hears that has none. Each case is a process of its own on the stand-in."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lunashm.errors import ForkedProcess, SettingsError, SharedMemoryError, WrongDevice
from lunashm.memory import gpus
from lunashm.memory.gpus import Gpu
from tests.standin import build
from tests.standin.peers import GPUS, attach, owner, peer

A, B = GPUS


# -- names, without a driver -------------------------------------------------------------------------------------------


def gpu(ordinal: int, uuid: str) -> Gpu:
    return Gpu(ordinal, uuid, "NVIDIA H100", mig=False, compute_mode="default", vmm=True, vmm_fd=True)


TWINS = [gpu(0, "GPU-12345678-aaaa-0000-0000-000000000000"), gpu(1, "GPU-12345678-bbbb-0000-0000-000000000000")]


@pytest.mark.parametrize(
    ("device", "ordinal"),
    [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("GPU-12345678-a", 0), ("gpu-12345678-BB", 1), (TWINS[1].uuid, 1)],
)
def test_names_of_gpus(device: str, ordinal: int) -> None:
    assert gpus.pick(device, TWINS).ordinal == ordinal


@pytest.mark.parametrize("device", ["cuda:2", "cuda:-1", "cuda:", "GPU-12345678", "GPU-", "MIG-12345678-a", "gpu", ""])
def test_name_that_means_no_gpu_or_two_is_refused_with_what_there_is(device: str) -> None:
    with pytest.raises(SettingsError, match=r"cuda:0, NVIDIA H100 \(GPU-12345678-aaaa.*cuda:1, NVIDIA H100"):
        gpus.pick(device, TWINS)


def test_gpu_that_a_process_does_not_see_is_named_with_those_it_sees() -> None:
    with pytest.raises(WrongDevice) as caught:
        gpus.find("GPU-99999999-0000-0000-0000-000000000000", TWINS[:1])
    assert str(caught.value) == (
        "the host's memory is on GPU-99999999-0000-0000-0000-000000000000; this process sees only cuda:0, NVIDIA H100 "
        "(GPU-12345678-aaaa-0000-0000-000000000000); "
        "start it with CUDA_VISIBLE_DEVICES=GPU-99999999-0000-0000-0000-000000000000"
    )


# -- what the driver says ----------------------------------------------------------------------------------------------


def test_process_really_uses_the_stand_in_and_the_real_bindings() -> None:
    with owner("cuda-vmm") as host:
        assert host("control.loaded()") == {str(build.folder() / build.LIBRARY)}
        assert "cuMemCreate" in host("control.calls()")
        assert host("import cuda.bindings; cuda.bindings.__version__") >= "12.8"


def test_devices_are_described_as_the_driver_does() -> None:
    with peer() as process:
        first, second = process("cuda.devices()")
        assert first == Gpu(0, A, "Stand-in GPU 0", mig=False, compute_mode="default", vmm=True, vmm_fd=True)
        assert (second.ordinal, second.uuid) == (1, B)
        assert process("cuda.describe(uuid)", uuid=B) == "cuda:1, Stand-in GPU 1"
        assert [process("cuda.resolve(d)", d=d) for d in ("cuda", "cuda:1", "GPU-bb", A)] == [A, B, B, A]
        assert process("control.contexts()") == 0  # looking takes no memory on any GPU


def test_what_a_device_cannot_do_is_known() -> None:
    with peer(LUNASHM_STANDIN_ATTRIBUTES="102=0,103=0,20=3", LUNASHM_STANDIN_NAME="NVIDIA H100 MIG 1g.10gb") as process:
        found = process("cuda.devices()[0]")
        assert (found.vmm, found.vmm_fd, found.compute_mode, found.mig) == (False, False, "exclusive-process", True)
        assert found.uuid.startswith("MIG-")


def test_rung_that_a_device_does_not_support_is_an_error_with_the_reason() -> None:
    with peer(LUNASHM_STANDIN_ATTRIBUTES="102=0") as process:
        with pytest.raises(SharedMemoryError, match=r"on cuda:0 Stand-in GPU 0 failed: CUDA_ERROR_NOT_SUPPORTED"):
            process("rung_for('cuda-vmm', cuda.resolve('cuda')).allocate(10)")
        assert process("control.live()") == {}


ORDERS = {
    "0,1": [A, B], "1,0": [B, A], "1": [B], "0,7,1": [A], B: [B], "GPU-bb,GPU-aa": [B, A], f"{B},0": [B, A], "1,1": [B],
}  # fmt: skip


@pytest.mark.parametrize("visible", ORDERS)
def test_memory_is_on_the_gpu_of_its_uuid_in_whatever_order_a_process_sees_them(visible: str) -> None:
    """The record of the stand-in says which of the machine's GPUs a pointer really leads to."""
    with owner("cuda-vmm", B) as vmm, owner("cuda-ipc", B, CUDA_VISIBLE_DEVICES="1,0") as ipc:
        assert vmm("control.used(0), control.used(1)") == ipc("control.used(0), control.used(1)") == (0, 2 << 20)
        with peer(CUDA_VISIBLE_DEVICES=visible) as client:
            assert client("[gpu.uuid for gpu in cuda.devices()]") == ORDERS[visible]
            for host in (vmm, ipc):
                if B not in ORDERS[visible]:
                    with pytest.raises(WrongDevice, match=f"on {B}; .* sees only cuda:0, .*VISIBLE_DEVICES={B}"):
                        attach(host, client)
                    continue
                assert attach(host, client).device == B
                assert client("bytes(mapping.peek(10, 6)), control.gpu_of(mapping.pointer)") == (b"shared", 1)


# -- what a process hears that cannot ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{"CUDA_VISIBLE_DEVICES": ""}, {"LUNASHM_STANDIN_DEVICES": "0"}])
def test_process_without_a_gpu_is_told_so(variables: dict[str, str]) -> None:
    with peer(**variables) as process:
        with pytest.raises(SettingsError, match=r"sees no NVIDIA GPU .* use cpu"):
            process("cuda.resolve('cuda')")
        with pytest.raises(WrongDevice, match=f"memory is on {A}; this process sees no GPU"):
            process("rung_for('cuda-vmm', uuid)", uuid=A)
        assert process("cuda.resolve('cpu')") == "cpu"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [(2, SharedMemoryError, "OUT_OF_MEMORY"), (3, ForkedProcess, "forked"), (999, SharedMemoryError, "UNKNOWN")],
)
def test_driver_that_does_not_start_is_an_error_of_ours(error: int, kind: type[Exception], words: str) -> None:
    with peer(LUNASHM_STANDIN_FAIL=f"cuInit={error}:1") as process:
        with pytest.raises(kind, match=words):
            process("cuda.devices()")
        assert len(process("cuda.devices()")) == 2  # the next try may succeed


def test_machine_without_a_driver_is_told_to_install_one() -> None:
    code = "from lunashm.memory import cuda; cuda.resolve('cuda')"
    environment = build.environment(LD_LIBRARY_PATH=None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        pytest.skip("this machine has a driver, and a GPU")
    assert re.search(r"SettingsError: .*(no NVIDIA driver on this machine.*install it|sees no NVIDIA GPU)", run.stderr)


def test_process_without_the_bindings_is_told_to_install_them() -> None:
    with peer() as process:
        process("import sys; sys.modules['cuda.bindings'] = None")
        with pytest.raises(SettingsError, match=r"install it: python -m pip install cuda-bindings"):
            process("cuda.devices()")


def test_nothing_of_cuda_is_loaded_where_no_gpu_is_wanted() -> None:
    with peer() as process:
        assert process("cuda.resolve('cpu'), cuda.describe('cpu')") == ("cpu", "cpu")
        process("rung_for('posix', 'cpu').allocate(10).free()")
        assert process("import sys; [name for name in sys.modules if name.split('.')[0] == 'cuda']") == []


FORK = """
def in_a_fork(act):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            act()
            text = "nothing"
        except BaseException as exc:
            text = f"{type(exc).__name__}: {exc}"
        os.write(write, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as said:
        return said.read()
"""


@pytest.mark.parametrize("rung", ["cuda-vmm", "cuda-ipc"])
def test_forked_child_hears_that_it_is_one_and_ends_nothing_of_its_parent(rung: str) -> None:
    with owner(rung) as host, peer() as client:
        attach(host, client)
        for process in (host, client):
            process(FORK)
        assert host("in_a_fork(lambda: rung.allocate(10))").startswith("ForkedProcess: ")
        assert host("in_a_fork(cuda.devices)").startswith("ForkedProcess: ")
        assert host("in_a_fork(rung.free_nbytes)").startswith("ForkedProcess: ")
        assert client("in_a_fork(lambda: mapping.peek(0, 1))").startswith("ForkedProcess: ")
        client("gone = []; mapping.when_gone(lambda: gone.append(1))")
        client("def drop():\n    global mapping\n    del mapping\n    assert gone == [1] and not logged")
        assert client("in_a_fork(drop)") == "nothing"
        assert client("bytes(mapping.peek(10, 6)), gone") == (b"shared", [])


def test_child_of_a_process_in_which_another_library_uses_cuda_hears_it_too() -> None:
    with peer() as process:
        process(FORK)
        process("import cuda.bindings.driver as other; other.cuInit(0)")
        assert process("in_a_fork(cuda.devices)").startswith("ForkedProcess: ")

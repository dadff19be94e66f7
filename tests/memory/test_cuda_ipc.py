"""What is particular to cuda-ipc, most of it the reason why cuda-vmm comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from lunashm.errors import SegmentGone, SharedMemoryError
from tests.standin.peers import GPUS, attach, lend, owner, peer, use
from tests.standin.process import Process


@pytest.fixture
def host() -> Iterator[Process]:
    with owner("cuda-ipc") as process:
        yield process


@pytest.fixture
def client() -> Iterator[Process]:
    with peer() as process:
        yield process


def test_rung_says_that_its_memory_dies_with_the_host(host: Process) -> None:
    assert host("rung.outlives_host, segment.descriptor()") == (False, None)
    assert host("rung_for('cuda-vmm', rung.device).outlives_host") is True


def test_write_of_one_process_reaches_all(host: Process, client: Process) -> None:
    """Nothing forbids it: read-only is a promise here. (On cuda-vmm the same write ends the writer.)"""
    with peer() as other:
        attach(host, client)
        attach(host, other)
        client("ctypes.memmove(mapping.pointer + 10, b'broken', 6)")
        assert other("bytes(mapping.peek(10, 6))") == b"broken"


def test_memory_freed_by_its_owner_is_not_the_segment_any_more(host: Process, client: Process) -> None:
    attach(host, client)
    host("segment.free()")
    assert client("bytes(mapping.peek(10, 6))") != b"shared"


def test_two_mappings_of_one_segment_do_not_end_each_other(host: Process, client: Process) -> None:
    """The driver maps a handle once per process, at one address, and counts."""
    attach(host, client)
    attach(host, client, mapping="second")
    assert client("mapping.pointer == second.pointer, control.live()") == (True, {"imports": 1})
    client("gone = []; mapping.when_gone(lambda: gone.append(1)); second.when_gone(lambda: gone.append(2))")
    assert client("del mapping\ngone, bytes(second.peek(10, 6))") == ([1], b"shared")
    assert client("del second\ngone, control.live()") == ([1, 2], {})


# -- handles that lead nowhere -----------------------------------------------------------------------------------------


def test_handle_of_freed_memory_is_gone(host: Process, client: Process) -> None:
    handle, _ = lend(host)
    host("segment.free()")
    with pytest.raises(SegmentGone, match=r"cuIpcOpenMemHandle.*the memory is gone.*attach again"):
        use(client, handle, None)
    host("later = rung.allocate(1000); later.write(0, b'another'); later.freeze()")
    with pytest.raises(SegmentGone):  # although its descriptor and address may be the same
        use(client, handle, None)
    assert client("control.live()") == {}


def test_handle_of_a_dead_owner_is_gone(host: Process, client: Process) -> None:
    handle, _ = lend(host)
    host.kill()
    with pytest.raises(SegmentGone):
        use(client, handle, None)


def test_handle_of_other_memory_than_the_host_said_is_gone(host: Process, client: Process) -> None:
    handle, _ = lend(host)
    version, name, nbytes, offset, *rest = msgspec.msgpack.decode(handle.data)

    def saying(*record: object) -> bytes:
        return msgspec.msgpack.encode([*record, *rest])

    with pytest.raises(SegmentGone, match="is not where the host said"):
        use(client, msgspec.structs.replace(handle, data=saying(version, name, nbytes, 2 << 20)), None)
    big = msgspec.structs.replace(handle, nbytes=4 << 20, data=saying(version, name, 4 << 20, offset))
    with pytest.raises(SegmentGone, match="is not where the host said"):
        use(client, big, None)
    for size in (0, -1, 999, 1001):
        with pytest.raises(SegmentGone, match=f"has not the {size} bytes"):
            use(client, msgspec.structs.replace(handle, nbytes=size), None)
    newer, short = saying(version + 1, name, nbytes, offset), msgspec.msgpack.encode([version, name, nbytes])
    for data in (b"", b"/", b"\xff\xfe", handle.data + b"x", newer, short, saying(version, name, nbytes, -1)):
        with pytest.raises(SegmentGone, match="which no cuda-ipc rung makes"):
            use(client, msgspec.structs.replace(handle, data=data), None)
    assert client("control.live()") == {}


def test_owner_is_told_that_it_cannot_open_its_own(host: Process) -> None:
    with pytest.raises(SharedMemoryError, match=r"this process's own.*attach from another process, or use cuda-vmm"):
        attach(host, host)


def test_process_of_another_pid_namespace_is_told_why_not_before_the_driver_is_asked(
    host: Process, client: Process
) -> None:
    handle, _ = lend(host)
    client("from lunashm import process; process.namespace = lambda pid='self': 1")
    with pytest.raises(SharedMemoryError, match=r"another PID namespace.*--memory cuda-vmm") as caught:
        use(client, handle, None)
    assert not isinstance(caught.value, SegmentGone)
    assert "cuIpcOpenMemHandle" not in client("control.calls()")


IN_A_NAMESPACE = """
import os, sys, msgspec
from lunashm.errors import SharedMemoryError
from lunashm.memory import open_handle
from lunashm.protocol import Handle
handle = msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=Handle)
try:
    open_handle(handle, int(sys.argv[2]) if len(sys.argv) > 2 else None).peek(10, 6)
    print("mapped")
except SharedMemoryError as exc:
    print(exc)
"""


def in_a_namespace(handle: object, *fds: int) -> str:
    from tests.standin import build

    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", sys.executable, "-c", IN_A_NAMESPACE]
    arguments = [msgspec.msgpack.encode(handle).hex(), *map(str, fds)]
    run = subprocess.run(
        [*command, *arguments], env=build.environment(), pass_fds=fds, capture_output=True, text=True, check=False
    )
    if "unshare failed" in run.stderr or "Operation not permitted" in run.stderr:
        pytest.skip("this machine forbids PID namespaces")
    return run.stdout + run.stderr


def test_a_real_pid_namespace_is_noticed_and_cuda_vmm_works_there(host: Process) -> None:
    handle, _ = lend(host)
    assert "another PID namespace, where CUDA IPC does not reach" in in_a_namespace(handle)
    with owner("cuda-vmm", GPUS[0]) as vmm:
        handle, descriptor = lend(vmm)
        assert descriptor is not None
        assert in_a_namespace(handle, descriptor).strip() == "mapped"
        os.close(descriptor)

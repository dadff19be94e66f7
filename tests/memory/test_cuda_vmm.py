"""What is particular to cuda-vmm: the GPU itself refuses writes, and bytes outlive their owner."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import msgspec
import pytest

from lunashm.errors import SegmentGone, SharedMemoryError, WrongDevice
from tests.standin.peers import GPUS, attach, lend, owner, peer, use
from tests.standin.process import Died, Process


@pytest.fixture
def host() -> Iterator[Process]:
    with owner("cuda-vmm") as process:
        yield process


@pytest.fixture
def client() -> Iterator[Process]:
    with peer() as process:
        yield process


WRITES = {
    "a kernel": "ctypes.memset(mapping.pointer + 10, 0, 1)",
    "a copy": "with mapping._device as device:\n    device.call('cuMemcpyHtoD', mapping.pointer, b'x', 1)",
}


@pytest.mark.parametrize("by", WRITES)
def test_write_kills_the_writer_and_nobody_else(host: Process, client: Process, by: str) -> None:
    with peer() as other:
        attach(host, client)
        attach(host, other)
        with pytest.raises(Died) as died:
            client(WRITES[by])
        assert died.value.signal == signal.SIGSEGV
        assert other("bytes(mapping.peek(10, 6))") == b"shared"
        attach(host, other, mapping="another")
        assert other("bytes(another.peek(10, 6))") == b"shared"


def test_owner_keeps_no_way_to_write_after_freeze(host: Process) -> None:
    assert host("control.live()") == {"handles": 1, "descriptors": 2}  # the driver's own, and the one to lend
    assert "standin-gpu" not in host("open('/proc/self/maps').read()")


def test_bytes_outlive_their_owner(host: Process, client: Process) -> None:
    attach(host, client)
    host.kill()
    assert client("bytes(mapping.peek(10, 6))") == b"shared"
    assert client("del mapping\ncontrol.live(), logged") == ({}, [])


def test_mapping_outlives_its_segment(host: Process, client: Process) -> None:
    attach(host, client)
    host("segment.free()")
    assert host("control.live()") == {}
    assert client("bytes(mapping.peek(10, 6))") == b"shared"


def test_process_may_open_its_own_segment_and_any_segment_twice(host: Process) -> None:
    attach(host, host)
    attach(host, host, mapping="second")
    assert host("mapping.pointer != second.pointer") is True
    assert host("del mapping\nbytes(second.peek(10, 6))") == b"shared"
    assert host("del second\nsegment.free()\ncontrol.live()") == {}


def test_descriptor_stays_with_whom_it_belongs_to(host: Process, client: Process) -> None:
    handle, descriptor = lend(host)
    assert descriptor is not None
    for _ in range(2):
        use(client, handle, descriptor)
    os.close(descriptor)
    assert client("bytes(mapping.peek(10, 6)), control.live()['mappings']") == (b"shared", 1)
    assert host("segment.descriptor() == segment.descriptor()") is True
    listing = "import subprocess; subprocess.run(['ls', '-l', '/proc/self/fd'], close_fds=False, capture_output=True)"
    assert "standin" not in host(f"{listing}.stdout.decode()")  # nor do programs get it that a host starts


# -- handles that lead nowhere -----------------------------------------------------------------------------------------


def test_handle_without_its_descriptor_is_gone(host: Process, client: Process) -> None:
    handle, descriptor = lend(host)
    assert descriptor is not None
    os.close(descriptor)
    with pytest.raises(SegmentGone, match="without its descriptor; attach again"):
        use(client, handle, None)
    host("segment.free()")
    for attribute in ("export", "descriptor", "freeze"):
        with pytest.raises(SegmentGone, match="was freed"):
            host(f"segment.{attribute}()")


def test_descriptor_of_something_else_is_not_mapped(host: Process, client: Process) -> None:
    handle, descriptor = lend(host)
    assert descriptor is not None
    os.close(descriptor)
    with open("/dev/null", "rb") as other, pytest.raises(SegmentGone, match=r"cuMemImport.*INVALID_VALUE"):
        use(client, handle, other.fileno())
    assert client("control.live()") == {}


def test_descriptor_of_smaller_memory_is_not_mapped(host: Process, client: Process) -> None:
    host(f"big = rung.allocate({3 << 20}); big.freeze()")
    handle, _ = lend(host, "big")
    os.close(host.received[0])
    _, small = lend(host)
    assert small is not None
    with pytest.raises(SegmentGone, match="cuMemMap"):
        use(client, handle, small)
    os.close(small)
    assert client("control.live()") == {}


def test_handles_that_make_no_sense_are_gone(host: Process, client: Process) -> None:
    handle, descriptor = lend(host)
    for nbytes in (0, -1, 999, 1001, 2 << 20):
        with pytest.raises(SegmentGone, match=f"has not the {nbytes} bytes"):
            use(client, msgspec.structs.replace(handle, nbytes=nbytes), descriptor)
    version, *rest = msgspec.msgpack.decode(handle.data)
    newer = msgspec.msgpack.encode([version + 1, *rest])
    mistyped = msgspec.msgpack.encode([1, 2, 3, 4])
    for data in (b"", b"/", b"\xff\xfe", handle.data + b"x", handle.data[:-1], newer, mistyped):
        with pytest.raises(SegmentGone, match="which no cuda-vmm rung makes"):
            use(client, msgspec.structs.replace(handle, data=data), descriptor)
    with pytest.raises(WrongDevice, match="was to be opened on"):
        client("rung_for('cuda-vmm', gpu).open(handle)", handle=handle, gpu=GPUS[1])
    assert client("control.live()") == {}


# -- freezing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", ["cuMemUnmap", "cuMemAddressFree"])
def test_segment_that_might_still_be_written_is_not_lent(host: Process, symbol: str) -> None:
    host("second = rung.allocate(10); control.fail(symbol, 999)", symbol=symbol)
    with pytest.raises(SharedMemoryError, match="may still be written; load it again"):
        host("second.freeze()")
    with pytest.raises(SegmentGone):
        host("second.export()")
    assert host("segment.free(); second.free()\ncontrol.live()") == {}


@pytest.mark.parametrize("symbol", ["cuCtxSynchronize", "cuMemExportToShareableHandle"])
def test_freeze_that_fails_early_may_be_tried_again(host: Process, symbol: str) -> None:
    host("second = rung.allocate(10); control.fail(symbol, 999)", symbol=symbol)
    with pytest.raises(SharedMemoryError, match=f"{symbol} on cuda:0"):
        host("second.freeze()")
    assert host("second.frozen") is False
    assert host("second.write(0, b'a'); second.freeze(); second.freeze()\nsecond.frozen") is True

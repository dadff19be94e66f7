"""The stand-in driver is as strict as the documentation of the real one: else the tests that run on it say little."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.standin.peers import attach, owner, peer
from tests.standin.process import Process

_RAW = """
from cuda.bindings import driver as d
from lunashm.memory.cuda_device import device_of
device = device_of(cuda.resolve("cuda"))
def name(result):
    return result[0].name.removeprefix("CUDA_")
"""
BLOCK = 2 << 20


@pytest.fixture
def process() -> Iterator[Process]:
    with peer() as process:
        process(_RAW)
        yield process


def test_calls_about_memory_need_a_context(process: Process) -> None:
    for call in ("cuMemAlloc(10)", "cuMemFree(4096)", "cuMemGetInfo()", "cuMemHostAlloc(10, 0)", "cuCtxSynchronize()"):
        assert process(f"name(d.{call})") == "ERROR_INVALID_CONTEXT"
    process("with device: pass")
    assert process("name(d.cuMemAlloc(10))") == "ERROR_INVALID_CONTEXT"  # and none is left behind
    assert process("name(d.cuCtxPopCurrent())") == "ERROR_INVALID_CONTEXT"


def test_memory_of_a_gpu_is_not_zero(process: Process) -> None:
    assert process("with device: pointer = device.alloc(10)\nctypes.string_at(pointer, 10)") == b"\xa5" * 10


def test_small_allocations_share_a_block_and_large_ones_do_not(process: Process) -> None:
    process("entered = device.__enter__()")
    process("first, second, large = device.alloc(1000), device.alloc(1000), device.alloc(3 << 20)")
    assert process("device.address_range(first) == device.address_range(second)") is True
    assert process("device.address_range(first)[1], device.address_range(large)[1]") == (BLOCK, 2 * BLOCK)
    assert process("device.address_range(large)[0] == large") is True


def test_nothing_is_released_twice(process: Process) -> None:
    process("device.__enter__(); a = device.alloc(10); p = device.call('cuMemHostAlloc', 10, 0)")
    process(f"memory = device.create({BLOCK}); at = device.reserve({BLOCK}); device.map(at, {BLOCK}, memory)")
    assert process(f"name(d.cuMemAddressFree(at, {BLOCK}))") == "ERROR_INVALID_VALUE"  # something is mapped there
    releases = [
        "d.cuMemFree(a)", "d.cuMemFreeHost(p)", "d.cuMemRelease(memory)",
        f"d.cuMemUnmap(at, {BLOCK})", f"d.cuMemAddressFree(at, {BLOCK})",
    ]  # fmt: skip
    for release in releases:
        assert process(f"name({release})") == "SUCCESS"
        assert process(f"name({release})") == "ERROR_INVALID_VALUE"
    assert process("control.live(), control.used(0)") == ({}, 0)


def test_import_is_not_closed_twice() -> None:
    with owner("cuda-ipc") as host, peer() as client:
        attach(host, client)
        client(_RAW + "device.__enter__(); at = mapping.pointer; keep = mapping")
        assert client("name(d.cuIpcCloseMemHandle(at))") == "SUCCESS"
        assert client("name(d.cuIpcCloseMemHandle(at))") == "ERROR_INVALID_VALUE"


def test_mapped_memory_is_out_of_reach_until_access_is_set(process: Process) -> None:
    process(f"device.__enter__(); memory = device.create({BLOCK}); at = device.reserve({BLOCK})")
    process(f"device.map(at, {BLOCK}, memory)")
    assert process("name(d.cuMemsetD8(at, 0, 1))") == "ERROR_INVALID_VALUE"
    process(f"device.allow(at, {BLOCK}, writing=True)")
    assert process("name(d.cuMemsetD8(at, 0, 1))") == "SUCCESS"
    assert process(f"name(d.cuMemsetD8(at, 0, {BLOCK} + 1))") == "ERROR_INVALID_VALUE"


def test_sizes_are_whole_granules(process: Process) -> None:
    process("entered = device.__enter__()")
    for code in ("device.create(1000)", "device.reserve(1000)"):
        with pytest.raises(Exception, match="INVALID_VALUE"):
            process(code)


def test_memory_ends_with_its_context(process: Process) -> None:
    process("with device: device.alloc(10)")
    assert process("name(d.cuDevicePrimaryCtxRelease(0)), control.live()") == ("SUCCESS", {})


def test_failures_come_when_they_were_asked_for(process: Process) -> None:
    process("device.__enter__(); a, b = device.alloc(10), device.alloc(10)")
    process("control.fail('cuMemGetInfo', 999, 2); control.fail('cuMemFree', 719); control.refuse('cuMemFree', 719, 2)")
    assert [process("name(d.cuMemGetInfo())") for _ in range(3)] == ["SUCCESS", "ERROR_UNKNOWN", "SUCCESS"]
    assert process("name(d.cuMemFree(a)), control.live()['allocations']") == ("ERROR_LAUNCH_FAILED", 1)
    assert process("name(d.cuMemFree(b)), control.live()['allocations']") == ("ERROR_LAUNCH_FAILED", 1)
    assert process("name(d.cuMemFree(b)), control.live()") == ("SUCCESS", {})

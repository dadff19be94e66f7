"""What both CUDA rungs do alike, beyond the contract suite: a GPU's memory, room, page-locked memory, and the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lunashm.errors import OutOfSharedMemory, SharedMemoryError
from lunashm.memory import ON_GPU
from tests.standin.peers import attach, owner, peer
from tests.standin.process import Process

MIB = 1 << 20
UNKNOWN = 999
"""CUDA_ERROR_UNKNOWN"""


@pytest.fixture(params=ON_GPU)
def rung(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(rung: str) -> Iterator[Process]:
    with owner(rung) as process:
        yield process


@pytest.fixture
def client() -> Iterator[Process]:
    with peer() as process:
        yield process


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_that_nobody_wrote_is_zero_although_the_gpu_s_is_not(host: Process, client: Process) -> None:
    attach(host, client)
    assert client("bytes(mapping.peek(0, 1000))") == bytes(10) + b"shared" + bytes(984)
    padding = "bytes((ctypes.c_char * (2 << 20)).from_address(mapping.pointer))[1000:].strip(bytes(1))"
    assert client(padding) == b""  # whoever maps the segment maps its padding, too


def test_segment_has_the_size_asked_for_and_takes_whole_blocks(host: Process) -> None:
    assert host("segment.nbytes, segment.export().nbytes") == (1000, 1000)
    assert host("control.used(0)") == 2 * MIB
    host(f"second = rung.allocate({2 * MIB} + 1)")
    assert host("control.used(0), rung.free_nbytes(), rung.total_nbytes()") == (6 * MIB, (1024 - 6) * MIB, 1024 * MIB)
    host("second.free(); segment.free(); segment.free()")
    assert host("control.used(0), control.live(), logged") == (0, {}, [])


def test_segments_are_seen_by_nobody_whom_they_were_not_lent_to(host: Process, client: Process) -> None:
    """Small allocations of a GPU share a block, and what is exported is the block: a segment is alone in its own."""
    host("other = rung.allocate(1000); other.write(0, b'secret'); other.freeze()")
    attach(host, client)
    assert client("b'secret' in bytes((ctypes.c_char * (2 << 20)).from_address(mapping.pointer))") is False
    attach(host, client, "other", "second")
    assert client("bytes(mapping.peek(10, 6)), bytes(second.peek(0, 6))") == (b"shared", b"secret")


def test_array_interface_leads_to_the_bytes_and_keeps_them_mapped(host: Process, client: Process) -> None:
    attach(host, client)
    client("gone = []; mapping.when_gone(lambda: gone.append(1))")
    interface = client("mapping.__cuda_array_interface__")
    assert interface["data"] == (client("mapping.pointer"), False)
    assert {**interface, "data": None} == {
        "version": 3, "shape": (1000,), "typestr": "|u1", "strides": None, "data": None, "stream": None,
    }  # fmt: skip
    client("stretch = mapping.at(10, 6); del mapping; gc.collect()")
    read = "ctypes.string_at(stretch.__cuda_array_interface__['data'][0], stretch.__cuda_array_interface__['shape'][0])"
    assert client(f"{read}, gone") == (b"shared", [])
    assert client("del stretch\ngone, control.live()") == ([1], {})


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (999, 2), (1001, 0), (1000, 1)])
def test_bytes_outside_a_segment_are_not_to_be_had(host: Process, client: Process, offset: int, nbytes: int) -> None:
    attach(host, client)
    for call in ("peek", "at"):
        with pytest.raises(ValueError, match="not in a segment of 1000 bytes"):
            client(f"mapping.{call}({offset}, {nbytes})")
    assert client("bytes(mapping.peek(1000, 0))") == b""


def test_many_threads_write_and_map_at_once(host: Process, client: Process) -> None:
    host("from concurrent.futures import ThreadPoolExecutor as Pool; big = rung.allocate(256 << 10)")
    host("list(Pool(8).map(lambda i: big.write(i << 12, bytes([i]) * (1 << 12)), range(64))); big.freeze()")
    attach(host, client, "big")
    client("from concurrent.futures import ThreadPoolExecutor as Pool; from cuda.bindings import driver")
    client("parts = Pool(8).map(lambda i: bytes(mapping.peek(i << 12, 1 << 12)), range(64))")
    assert client("all(part == bytes([i]) * (1 << 12) for i, part in enumerate(parts))")
    assert client("int(driver.cuCtxGetCurrent()[1])") == 0  # no thread is left with a context it did not choose


# -- the end -----------------------------------------------------------------------------------------------------------


def test_memory_is_unmapped_after_the_gpu_is_idle_and_before_anybody_hears_of_it(
    host: Process, client: Process
) -> None:
    """Kernels that read it may still run when Python drops the last tensor; the owner frees it when it hears."""
    attach(host, client)
    client("at_the_end = []; mapping.when_gone(lambda: at_the_end.append((control.live(), control.calls())))")
    client("control.forget(); del mapping")
    live, calls = client("at_the_end[0]")
    assert live == {}
    unmapped = max(calls.index(name) for name in ("cuMemUnmap", "cuIpcCloseMemHandle") if name in calls)
    assert calls.index("cuThreadExchangeStreamCaptureMode") < calls.index("cuCtxSynchronize") < unmapped
    assert calls.count("cuThreadExchangeStreamCaptureMode") == 2  # as it was before


@pytest.mark.parametrize("broken", ["cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode", "cuCtxSynchronize"])
@pytest.mark.parametrize("tried_again", ["another ends", "another is opened"])
def test_mapping_that_cannot_be_known_to_be_unused_stays_until_it_can(
    host: Process, client: Process, broken: str, tried_again: str
) -> None:
    """The driver refuses to wait while a CUDA graph is being captured; the owner must not hear of an end before it."""
    attach(host, client, mapping="other")
    attach(host, client)
    client("gone = []; mapping.when_gone(lambda: gone.append(1)); mapping.when_gone(lambda: gone.append(2))")
    before = client("control.live()")
    client("control.refuse(symbol, 900); del mapping", symbol=broken)
    assert client("gone, control.live()") == ([], before)
    assert any("a mapping stays for now" in line and "CAPTURE_UNSUPPORTED" in line for line in client("logged"))
    if tried_again == "another ends":
        client("del other")
    else:
        attach(host, client, mapping="third")
    assert client("sorted(gone)") == [1, 2]


@pytest.mark.parametrize("how", ["fail", "refuse"])
def test_mapping_that_was_perhaps_not_unmapped_is_never_told_of(
    rung: str, host: Process, client: Process, how: str
) -> None:
    """Its lease ends with the process."""
    unmap = {"cuda-vmm": "cuMemUnmap", "cuda-ipc": "cuIpcCloseMemHandle"}[rung]
    attach(host, client)
    client("gone = []; mapping.when_gone(lambda: gone.append(1))")
    client("getattr(control, how)(symbol, 999); del mapping", how=how, symbol=unmap)
    assert client("gone") == []
    assert any(f"{unmap} on cuda:0 Stand-in GPU 0 failed: CUDA_ERROR_UNKNOWN" in line for line in client("logged"))
    assert any("may stay until this process ends" in line for line in client("logged"))


def test_callback_that_fails_keeps_no_other_from_being_called(host: Process, client: Process) -> None:
    attach(host, client)
    client("gone = []; mapping.when_gone(lambda: 1 / 0); mapping.when_gone(lambda: gone.append(1))")
    client("import sys; sys.unraisablehook = sys.excepthook = lambda *_: None")
    assert client("del mapping\ngone, control.live()") == ([1], {})


def test_mapping_may_end_in_any_thread_in_the_middle_of_a_call(host: Process, client: Process) -> None:
    attach(host, client)
    attach(host, client, mapping="other")
    client("gone = []; mapping.when_gone(lambda: gone.append(1))")
    client("cycle = [mapping]; cycle.append(cycle); del mapping, cycle")
    client("import threading\ndef collect():\n    with other._device:\n        gc.collect()\n")
    client("thread = threading.Thread(target=collect); thread.start(); thread.join()")
    assert client("gone, bytes(other.peek(10, 6)), logged") == ([1], b"shared", [])


def test_process_that_ends_with_a_mapping_says_nothing(host: Process, client: Process) -> None:
    attach(host, client)
    client("mapping.when_gone(lambda: os.kill(os.getpid(), 9))")
    client.close()
    assert client.returncode == 0


# -- one process dies --------------------------------------------------------------------------------------------------


def test_killed_user_costs_the_owner_and_others_nothing(host: Process, client: Process) -> None:
    with peer() as other:
        attach(host, client)
        attach(host, other)
        client.kill()
        assert other("bytes(mapping.peek(10, 6))") == b"shared"
        other("del mapping")
        attach(host, other)
        other("del mapping")
        host("segment.free()")
        assert host("control.live(), control.used(0), rung.free_nbytes() == rung.total_nbytes()") == ({}, 0, True)


# -- room --------------------------------------------------------------------------------------------------------------


def test_segment_that_does_not_fit_is_refused_before_anything_is_taken(rung: str) -> None:
    with peer(LUNASHM_STANDIN_MEMORY=str(8 * MIB)) as process:
        process("rung = rung_for(name, cuda.resolve('cuda:1')); first = rung.allocate(1)", name=rung)
        process("control.forget()")
        with pytest.raises(OutOfSharedMemory) as caught:
            process(f"rung.allocate({7 * MIB})")
        assert str(caught.value) == (
            "a segment does not fit on cuda:1 Stand-in GPU 1: 8.4 MB needed, 6.3 MB free of 8.4 MB; unload a model "
            "(lunashm unload), close what else uses the GPU, or load fewer bytes (--dtype)"
        )
        assert not {"cuMemCreate", "cuMemAlloc"} & set(process("control.calls()"))
        process(f"second = rung.allocate({6 * MIB}); second.free(); first.free()")
        assert process("control.live()") == {}


def test_room_that_another_takes_meanwhile_is_reported_as_such(rung: str, host: Process) -> None:
    before = host("control.live()")
    symbol = {"cuda-vmm": "cuMemCreate", "cuda-ipc": "cuMemAlloc"}[rung]
    host("control.fail(symbol, 2)", symbol=symbol)
    with pytest.raises(OutOfSharedMemory, match=r"2\.1 MB needed, .* free of .*lunashm unload"):
        host("rung.allocate(10)")
    assert host("control.live()") == before


@pytest.mark.parametrize("nbytes", [0, -1])
def test_segment_has_at_least_one_byte(host: Process, nbytes: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        host(f"rung.allocate({nbytes})")


# -- page-locked memory ------------------------------------------------------------------------------------------------


def test_staging_is_page_locked_writable_and_given_back(host: Process) -> None:
    host("second = rung.allocate(3)")
    host("with rung.staging(3) as view:\n    view[:] = b'abc'; second.write(0, view); during = control.live()")
    assert host("during['pinned'], 'pinned' in control.live()") == (1, False)
    host("with contextlib.suppress(ZeroDivisionError), rung.staging(3) as view:\n    1 / 0")
    host("with rung.staging(0) as view:\n    assert len(view) == 0 and not view.readonly")
    assert "pinned" not in host("control.live()")


def test_staging_that_there_is_no_room_for_is_an_error_of_ours(host: Process) -> None:
    host("control.fail('cuMemHostAlloc', 2)")
    with pytest.raises(SharedMemoryError, match=r"no RAM to lock for copying to cuda:0 .*OUT_OF_MEMORY"):
        host("with rung.staging(10):\n    pass")


# -- what torch is told ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_settings_of_torch_s_allocator_change_nothing(rung: str, settings: str) -> None:
    """The memory comes from the driver. torch could export none of its own under these."""
    with owner(rung, PYTORCH_CUDA_ALLOC_CONF=settings, PYTORCH_ALLOC_CONF=settings) as host, peer() as client:
        attach(host, client)
        assert client("bytes(mapping.peek(10, 6))") == b"shared"
        assert host("import sys; 'torch' in sys.modules") is False
        assert host("segment.export().rung") == rung

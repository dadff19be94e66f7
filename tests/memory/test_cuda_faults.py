"""Every call of the driver that a segment's life makes fails once, in turn: an error of ours or a line in the log, and
nothing left over. A call that releases something fails after it did so, as CUDA reports errors of earlier work."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lunashm.errors import ForkedProcess, LunashmError, OutOfSharedMemory, SharedMemoryError
from lunashm.memory import ON_GPU
from tests.standin.peers import GPUS, lend, peer, use
from tests.standin.process import Process

ERRORS = {2: OutOfSharedMemory, 3: ForkedProcess, 719: SharedMemoryError}
"""CUDA_ERROR_OUT_OF_MEMORY, NOT_INITIALIZED, LAUNCH_FAILED"""


class Life:
    """A segment's whole life in two processes."""

    def __init__(self, host: Process, client: Process) -> None:
        self.host = host
        self.client = client

    def run(self) -> None:
        self.host("segment = rung.allocate(1000)")
        self.host("with rung.staging(3) as view:\n    view[:] = b'abc'\n    segment.write(0, view)")
        self.host("segment.freeze()")
        handle, descriptor = lend(self.host)
        try:
            use(self.client, handle, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        assert self.client("bytes(mapping.peek(0, 4))") == b"abc\0"

    def end(self) -> None:
        """What programs do whatever happened before."""
        self.client("mapping = None")
        self.host("segment = segment.free() if segment else None")


@pytest.fixture(params=ON_GPU)
def life(request: pytest.FixtureRequest) -> Iterator[Life]:
    with peer() as host, peer() as client:
        for process in (host, client):
            process("rung = rung_for(name, gpu)\nsegment = None", name=request.param, gpu=GPUS[0])
        life = Life(host, client)
        life.run()  # the context is there from now on
        life.end()
        yield life


def calls(life: Life, process: Process) -> list[tuple[str, int]]:
    """Each call of a whole life in one of the processes, and which of its name it is."""
    process("control.forget()")
    life.run()
    life.end()
    names = process("control.calls()")
    return [(name, names[:place].count(name) + 1) for place, name in enumerate(names)]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["host", "client"])
def test_each_call_that_fails_is_told_of_and_leaves_nothing(life: Life, where: str, error: int) -> None:
    """One thing cannot be helped: what can only be released within a context stays where that is refused, too."""
    process: Process = getattr(life, where)
    cases = calls(life, process)
    assert len(cases) >= 15
    life.client("from lunashm.memory import ending")
    before = {"host": life.host("control.live()"), "client": life.client("control.live()")}
    for symbol, nth in cases:
        process("control.forget(); logged.clear()")
        process("control.fail(symbol, error, nth)", symbol=symbol, error=error, nth=nth)
        raised = None
        try:
            life.run()
        except LunashmError as exc:
            raised = exc
        life.end()
        life.client("ending.finish_parked()")  # as the next mapping would
        logged = process("logged")
        case = f"{symbol}, call {nth}: {raised}, {logged}"
        told = [*logged, *([f"{raised} {raised.__cause__}"] if raised else [])]
        assert any(symbol in text or isinstance(raised, OutOfSharedMemory) for text in told), case
        assert raised is None or isinstance(raised, (ERRORS[error], SharedMemoryError)), case
        left = {"host": life.host("control.live()"), "client": life.client("control.live()")}
        if any("failed: CUDA_ERROR_INVALID_CONTEXT" in line for line in logged):
            assert symbol == "cuCtxPushCurrent", case
            before = left
        assert left == before, case
    process("control.forget()")
    life.run()  # and all is as good as before
    life.end()


@pytest.mark.parametrize("error", ERRORS)
def test_each_call_of_the_start_that_fails_is_told_of(error: int) -> None:
    with peer() as process:
        process("cuda.devices(); rung_for('cuda-vmm', gpu).free_nbytes()", gpu=GPUS[0])
        names = process("control.calls()")
    cases = [(name, names[:place].count(name) + 1) for place, name in enumerate(names)]
    assert {"cuInit", "cuDeviceGetUuid", "cuDevicePrimaryCtxRetain", "cuMemGetInfo"} <= {name for name, _ in cases}
    for symbol, nth in {name: nth for name, nth in cases}.items():  # the last call of each name
        with peer(LUNASHM_STANDIN_FAIL=f"{symbol}={error}:{nth}") as process:
            raised = None
            try:
                process("cuda.devices(); rung_for('cuda-vmm', gpu).free_nbytes()", gpu=GPUS[0])
            except LunashmError as exc:
                raised = exc
            assert raised is None or isinstance(raised, ERRORS[error])
            assert symbol in f"{raised} {process('logged')}"
            assert process("rung_for('cuda-vmm', gpu).free_nbytes()", gpu=GPUS[0]) == 1 << 30  # the next try works

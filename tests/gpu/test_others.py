"""What one client, or the owner, does to the others on a real GPU, and what clients take of its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contracts.actors import ActorProcess
from tests.contracts.remote import RemoteRung
from tests.contracts.rungs import Entry, only
from tests.gpu import weights
from tests.gpu.programs import Program

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@only(lambda entry: entry.read_only)
def test_kernel_that_writes_harms_its_own_process_alone(rung: RemoteRung, run: Callable[..., Program]) -> None:
    segment = weights.shared(rung)
    sibling, writer = run("compute", segment), run("write", segment)
    before = sibling.hear()
    assert before[0] == weights.digest()
    assert writer.hear() == "mapped"
    writer.tell()
    outcome = writer.hear_or_death()
    assert outcome.get("died") or (outcome["raised"] and outcome["later"]), outcome
    sibling.tell()
    assert sibling.hear() == before
    assert run("compute", segment).hear() == before
    assert rung.map(segment).digest() == weights.digest()
    sibling.tell()
    assert sibling.hear() == before


def test_owner_is_killed_while_a_client_reads(
    entry: Entry, rung: RemoteRung, owner: ActorProcess, run: Callable[..., Program],
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """Where memory dies with its owner, what a client sees then is a fact to know; that is why it watches the owner."""
    reader = run("read_on", weights.shared(rung))
    assert reader.hear() == weights.digest()
    owner.kill()
    reader.tell()
    seen = reader.hear_or_death()
    record_property(f"owner killed {entry.rung}", seen)
    print(f"owner killed {entry.rung}: {seen}")
    if entry.outlives_host:
        assert seen == {"same": 50, "other": 0, "raised": ""}


def test_attaching_a_hundred_times_takes_no_memory_of_the_device(
    rung: RemoteRung, run: Callable[..., Program]
) -> None:
    """Device-wide, so that it does not matter whose the driver thinks shared memory is."""
    nbytes = 256 * MIB
    segment = rung.allocate(nbytes)
    segment.fill(1)
    segment.freeze()
    client = run("cycles", segment)
    first = client.hear()
    used = nvml_used(rung.device)
    assert first["before"] - first["with_one"] < nbytes // 4, "a mapping took memory of its own"
    client.tell()
    after = client.hear()["after"]
    assert abs(after - first["before"]) < nbytes // 4, (after, first)
    assert abs(nvml_used(rung.device) - used) < nbytes // 4
    client.tell()
    assert client.end() == 0


def nvml_used(uuid: str) -> int:
    """Bytes in use on the whole device, as nvidia-smi has it."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).used)
    finally:
        pynvml.nvmlShutdown()

"""Free memory of a stand-in GPU is what no process holds, where they share a ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from lunashm.errors import OutOfSharedMemory
from tests.standin.peers import GPUS, attach, peer
from tests.standin.process import Process

MIB = 1 << 20
_FREE = "rung.free_nbytes()"


def _holder(ledger: Path, gpu: str = GPUS[0]) -> Process:
    process = Process(LUNASHM_STANDIN_LEDGER=str(ledger), LUNASHM_STANDIN_MEMORY=str(64 * MIB))
    process("from lunashm.memory import rung_for, open_handle\nfrom tests.standin import control")
    process("rung = rung_for('cuda-vmm', gpu)", gpu=gpu)
    return process


def test_what_one_process_holds_is_not_free_for_another(runtime: Path) -> None:
    with _holder(runtime / "ledger") as one, _holder(runtime / "ledger") as other:
        assert other(_FREE) == 64 * MIB
        one(f"segment = rung.allocate({10 * MIB})")
        assert (one(_FREE), other(_FREE)) == (54 * MIB, 54 * MIB)
        assert other("control.used(0)") == 0
        with pytest.raises(OutOfSharedMemory):
            other(f"rung.allocate({60 * MIB})")
        one("segment.free()")
        other(f"segment = rung.allocate({60 * MIB})")
        assert one(_FREE) == 4 * MIB


def test_gpus_have_an_account_each(runtime: Path) -> None:
    with _holder(runtime / "ledger", GPUS[0]) as one, _holder(runtime / "ledger", GPUS[1]) as other:
        one(f"segment = rung.allocate({10 * MIB})")
        assert (one(_FREE), other(_FREE)) == (54 * MIB, 64 * MIB)


def test_memory_that_is_mapped_counts_once(runtime: Path) -> None:
    with _holder(runtime / "ledger") as host, _holder(runtime / "ledger") as client:
        host(f"segment = rung.allocate({10 * MIB}); segment.freeze()")
        attach(host, client)
        assert (host(_FREE), client(_FREE)) == (54 * MIB, 54 * MIB)


def test_what_a_process_held_is_free_once_it_is_dead(runtime: Path) -> None:
    with _holder(runtime / "ledger") as survivor:
        with _holder(runtime / "ledger") as victim:
            victim(f"segment = rung.allocate({10 * MIB})")
            assert survivor(_FREE) == 54 * MIB
            victim.kill()
        assert survivor(_FREE) == 64 * MIB
        with _holder(runtime / "ledger") as next_one:  # has the place of the dead
            assert (next_one(_FREE), survivor(_FREE)) == (64 * MIB, 64 * MIB)


def test_without_a_ledger_each_process_has_gpus_of_its_own() -> None:
    with peer() as one, peer() as other:
        for process in (one, other):
            process("rung = rung_for('cuda-vmm', gpu)", gpu=GPUS[0])
        one(f"segment = rung.allocate({10 * MIB})")
        assert other(f"{_FREE} == rung.total_nbytes()")

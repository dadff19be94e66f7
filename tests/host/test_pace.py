from __future__ import annotations

import pytest

from lunashm.host.pace import GPU_BLOCK_NBYTES, RAM_BLOCK_NBYTES, Pace

GPU = "GPU-00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(("cores", "readers"), [(1, 1), (2, 1), (4, 2), (16, 8), (128, 8)])
def test_readers_leave_cores_to_the_digest(cores: int, readers: int) -> None:
    assert Pace.on("cpu", cores).readers == readers


def test_digest_is_shared_by_threads_only_where_there_are_cores_for_them() -> None:
    assert [Pace.on("cpu", cores).digesters for cores in (1, 2, 4)] == [1, 1, 1]
    assert Pace.on("cpu", 16).digesters > 1


def test_blocks_stay_in_the_cache_for_ram_and_are_large_for_a_gpu() -> None:
    assert Pace.on("cpu", 2).block_nbytes == RAM_BLOCK_NBYTES
    assert Pace.on(GPU, 2).block_nbytes == GPU_BLOCK_NBYTES


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("cores", [1, 2, 8, 256])
def test_memory_on_the_way_is_bounded_and_every_reader_can_have_a_buffer(device: str, cores: int) -> None:
    pace = Pace.on(device, cores)
    assert pace.buffers > pace.readers
    assert pace.buffers * pace.block_nbytes <= 100 << 20


def test_small_file_takes_no_more_than_it_needs() -> None:
    assert Pace(1000, 8, 4, 1).for_file(300) == Pace(300, 1, 1, 1)
    assert Pace(1000, 8, 4, 1).for_file(2001) == Pace(1000, 3, 3, 1)
    assert Pace(1000, 8, 4, 1).for_file(10**9) == Pace(1000, 8, 4, 1)


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    assert Pace.on("cpu") == Pace.on("cpu", 6)

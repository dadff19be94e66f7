from __future__ import annotations

import pytest

from lunashm import protocol as p
from lunashm.usage import ProcessId, Unseen, account
from lunashm.usage.history import History, Start
from lunashm.usage.nvml import GpuMemory
from lunashm.usage.ram import Ram

GB = 10**9
HOST = ProcessId(10, 7)
START = Start("2026-11-23T10:00:00+00:00", 3 * GB)


def model(generation: int, gigabytes: int, state: str = "ready", loaded: int | None = None) -> p.ModelInfo:
    nbytes = gigabytes * GB
    return p.ModelInfo(
        name=f"m{generation}", path=f"/m{generation}", digest="", generation=generation, state=state, rung="posix",
        dtypes={}, tensors=1, nbytes=nbytes, memory_nbytes=0 if state == "loading" else nbytes,
        loaded_nbytes=nbytes if loaded is None else loaded, clients=0, saved=0, until="unload", load_s=1.0, rules=(),
    )  # fmt: skip


def status(*models: p.ModelInfo, device: str = "cpu") -> p.Status:
    host = p.HostInfo("id", 10, 7, device, device, "posix", "", "ipc:///cpu.sock", "1", (), 0.0)
    return p.Status(host, 60.0, models, 0, 0, 0, 0, 0, {})


def client(pid: int, *generations: int, namespace: int = 7) -> p.ClientStatus:
    info = p.ClientInfo(pid, namespace, 5, "python", f"c{pid}", "1")
    leases = tuple(p.LeaseInfo(g, str(pid), pid, "python", "", f"m{g}", g, 1.0) for g in generations)
    return p.ClientStatus(str(pid), info, "process", 1.0, 1.0, leases)


def process(pid: int) -> ProcessId:
    return ProcessId(pid, 7, 5)


# -- CPU ---------------------------------------------------------------------------------------------------------------


def test_total_is_the_sum_of_pss_and_unshared_a_copy_for_each_client() -> None:
    memory = {
        HOST: Ram(GB, 0, GB, 0),
        process(1): Ram(3 * GB, 2 * GB, GB, 4 * GB),
        process(2): Ram(4 * GB, 2 * GB, 2 * GB, 4 * GB),
    }
    use = account.on_cpu(status(model(1, 4)), (client(1, 1), client(2, 1)), memory)
    assert use.ram == account.RamUse(8 * GB, 0, (1 + 2 + 2 * 4) * GB, 2)
    assert [one.kind for one in use.processes] == ["host", "python", "python"]
    first = use.processes[1]
    assert (first.shared_nbytes, first.private_nbytes, first.pss_nbytes) == (4 * GB, GB, 3 * GB)
    assert first.models == ("m1",)


def test_weights_that_nobody_maps_are_in_the_total_all_the_same() -> None:
    loading = model(2, 6, "loading", loaded=2 * GB)
    use = account.on_cpu(status(model(1, 4), loading), (), {HOST: Ram(GB, GB // 2, GB // 2, 0)})
    assert use.weights_nbytes == 6 * GB
    assert use.ram == account.RamUse(GB + 6 * GB - GB // 2, 6 * GB - GB // 2, 0, 0)


def test_memory_that_is_mapped_and_in_no_book_counts_too() -> None:
    """Clients of a host that died map its memory while the next host loads the same file."""
    memory = {HOST: Ram(GB, 0, GB, 0), process(1): Ram(9 * GB, 8 * GB, GB, 8 * GB)}
    use = account.on_cpu(status(model(1, 4)), (client(1, 1),), memory)
    assert use.ram == account.RamUse(10 * GB, 0, 5 * GB, 1)


def test_model_held_thrice_by_one_process_is_one_copy_and_the_process_counts_once() -> None:
    memory = {HOST: Ram(GB, 0, GB, 0), process(1): Ram(5 * GB, 4 * GB, GB, 4 * GB)}
    use = account.on_cpu(status(model(1, 4), model(2, 3)), (client(1, 1, 1, 2), client(1, 1)), memory)
    assert use.ram is not None
    assert (use.ram.unshared_nbytes, use.ram.clients) == (GB + 7 * GB, 1)
    assert use.ram.total_nbytes == 6 * GB + 3 * GB
    assert [one.models for one in use.processes] == [(), ("m1", "m2"), ("m1",)]


def test_host_that_is_its_own_client_counts_once() -> None:
    own = ProcessId(10, 7, 5)
    use = account.on_cpu(status(), (client(10),), {HOST: Ram(GB, 0, GB, 0), own: Ram(GB, 0, GB, 0)})
    assert use.ram == account.RamUse(GB, 0, GB, 1)


def test_client_that_cannot_be_seen_is_in_no_sum_and_has_its_reason() -> None:
    memory = {HOST: Ram(GB, 0, GB, 0), process(1): Unseen("another user's")}
    use = account.on_cpu(status(), (client(1),), memory)
    assert use.ram == account.RamUse(GB, 0, 0, 0)
    assert (use.processes[1].pss_nbytes, use.processes[1].unseen) == (None, "another user's")


# -- GPU ---------------------------------------------------------------------------------------------------------------


def test_device_is_the_headline_and_processes_are_not_added_up() -> None:
    memory = GpuMemory(20 * GB, 80 * GB, {10: 5 * GB, 1: 6 * GB, 2: None})
    clients = (client(1, 1), client(2, 1), client(3), client(4, namespace=8))
    use = account.on_gpu(status(model(1, 4), device="GPU-a"), clients, memory, 7, START)
    assert use.device == account.DeviceUse(20 * GB, 80 * GB, START.at, 17 * GB, 16 * GB)
    assert use.ram is None
    assert [one.nvml_nbytes for one in use.processes] == [5 * GB, 6 * GB, None, None, None]
    assert [one.shared_nbytes for one in use.processes] == [None, 4 * GB, 4 * GB, 0, 0]
    assert [one.unseen[:14] for one in use.processes] == ["", "", "NVML has no fi", "not among the ", "in another PID"]


@pytest.mark.parametrize(("loaded", "beyond"), [(0, 20), (1, 14)])
def test_gpu_gives_the_memory_of_a_model_that_loads_all_at_once(loaded: int, beyond: int) -> None:
    loading = model(1, 6, "loading", loaded=loaded)
    use = account.on_gpu(status(loading, device="GPU-a"), (), GpuMemory(20 * GB, 80 * GB, {}), 7, START)
    assert use.device is not None
    assert use.device.beyond_nbytes == beyond * GB


def test_gpu_that_cannot_be_seen_is_one_reason_and_not_one_for_each_process() -> None:
    use = account.on_gpu(status(device="GPU-a"), (client(1),), Unseen("NVML: lost"), 7, START)
    assert (use.device, use.unseen) == (None, "NVML: lost")
    assert [one.unseen for one in use.processes] == ["", ""]


def test_processes_that_nvml_does_not_list_have_its_reason() -> None:
    memory = GpuMemory(0, GB, Unseen("NVML: Not Supported"))
    use = account.on_gpu(status(device="GPU-a"), (), memory, 7, START)
    assert use.device is not None
    assert use.processes[0].unseen == "NVML: Not Supported"


# -- before ------------------------------------------------------------------------------------------------------------


def test_peaks_and_starts_are_kept_through_looks_that_see_nothing() -> None:
    history = History()
    assert history.peak("a", None) is None
    assert [history.peak("a", now) for now in (3, None, 5, 2)] == [3, 3, 5, 5]
    assert history.start("GPU-a", 7, "t0") == history.start("GPU-a", 9, "t1") == Start("t0", 7)

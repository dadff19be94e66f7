"""A model on a GPU: loaded once, attached by several processes, on the right device, by the rung that works."""

from __future__ import annotations

from pathlib import Path

import pytest

from lunashm.errors import HostLost, HostUnavailable, OutOfSharedMemory, WrongDevice
from tests import checkpoints
from tests.conftest import segments
from tests.cuda.conftest import Connect, Serve

SPECS = {"a": ("F32", (300, 1000)), "b": ("F16", (7, 5)), "c": ("BF16", (1 << 20,)), "d": ("F32", ())}
RUNGS = ["cuda-vmm", "cuda-ipc"]


@pytest.fixture
def path(models: Path) -> Path:
    path = models / "m.safetensors"
    checkpoints.write(path, SPECS)
    return path


def test_auto_takes_vmm_and_every_client_sees_the_files_bytes(serve: Serve, connect: Connect, path: Path) -> None:
    before = segments()
    host = serve("--device", "cuda:0")
    assert host.ready["rung"] == "cuda-vmm", host.ready
    assert host.ready["device"].startswith("GPU-")
    assert host.ready["device_name"] == "cuda:0, Stand-in GPU 0"
    assert "cuda-vmm works (round trip in" in host.log()
    assert "cuda-ipc was not tried: it comes after the one that is taken" in host.log()
    for client in (connect(), connect()):
        assert client("model = attach(path, device='cuda:0'); same(model, path)", path=str(path))
        assert client("model.checksum()") == client("model.checksum()")
        assert client("next(iter(control.loaded())).startswith('/')")
    model = host.ask("ps", "--device", "cuda")["models"][0]
    assert (model["rung"], model["clients"], model["device_name"]) == ("cuda-vmm", 2, "cuda:0, Stand-in GPU 0")
    assert segments() <= before, "nothing of it is in /dev/shm"


@pytest.mark.parametrize("rung", RUNGS)
def test_rung_that_is_asked_for_is_the_one_that_is_used(
    serve: Serve, connect: Connect, path: Path, rung: str
) -> None:
    host = serve("--device", "cuda:1", "--memory", rung)
    client = connect()
    assert client("model = attach(path, device='cuda:1'); same(model, path)", path=str(path))
    assert client("[(m.handle.rung, m.handle.device) for m in model._mappings]") == [(rung, host.ready["device"])]
    assert client("[control.gpu_of(m.pointer) for m in model._mappings]") == [1]


@pytest.mark.parametrize("configuration", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_settings_of_torchs_allocator_do_not_matter(
    serve: Serve, connect: Connect, path: Path, configuration: str
) -> None:
    """The host's memory comes from the driver; clients hand the driver's addresses to torch."""
    serve("--device", "cuda:0", "--memory", "cuda-ipc", PYTORCH_CUDA_ALLOC_CONF=configuration)
    client = connect(PYTORCH_CUDA_ALLOC_CONF=configuration)
    assert client("same(attach(path, device='cuda:0'), path)", path=str(path))


# -- which rung --------------------------------------------------------------------------------------------------------


def test_auto_falls_back_to_ipc_and_says_why_everywhere(serve: Serve, connect: Connect, path: Path) -> None:
    host = serve("--device", "cuda:0", LUNASHM_STANDIN_FAIL="cuMemCreate=801:1")
    assert host.ready["rung"] == "cuda-ipc", host.ready
    why = "cuda-vmm does not work here: cuMemCreate on cuda:0 Stand-in GPU 0 failed: CUDA_ERROR_NOT_SUPPORTED"
    assert why in host.ready["rung_reason"]
    assert why in host.log()
    assert why in host.ask("status")["hosts"][0]["host"]["rung_reason"]
    assert connect()("same(attach(path, device='cuda:0'), path)", path=str(path))


def test_host_does_not_start_where_no_rung_works(serve: Serve) -> None:
    host = serve("--device", "cuda:0", LUNASHM_STANDIN_FAIL="cuMemCreate=801:1,cuIpcGetMemHandle=801:1")
    message = host.ready["error"]["message"]
    assert "cuda-vmm does not work here: cuMemCreate" in message
    assert "cuda-ipc does not work here: cuIpcGetMemHandle" in message
    assert host.stop() == 2


@pytest.mark.parametrize(("device", "said"), [("cuda:7", "cuda:7"), ("GPU-ffff", "GPU-ffff"), ("tpu", "tpu")])
def test_device_that_there_is_not_is_named_beside_those_that_there_are(serve: Serve, device: str, said: str) -> None:
    message = serve("--device", device).ready["error"]["message"]
    assert said in message
    assert "cuda:1, Stand-in GPU 1 (GPU-" in message


def test_machine_without_a_gpu_is_told_so(serve: Serve) -> None:
    message = serve("--device", "cuda", CUDA_VISIBLE_DEVICES="").ready["error"]["message"]
    why = "this process sees no NVIDIA GPU (CUDA_VISIBLE_DEVICES is ''); use cpu"
    assert message == f"device 'cuda' cannot be used: {why}"


# -- several devices ---------------------------------------------------------------------------------------------------


def test_one_host_for_each_gpu_and_clients_find_theirs(serve: Serve, connect: Connect, path: Path) -> None:
    hosts = [serve("--device", f"cuda:{number}") for number in (0, 1)]
    listed = hosts[0].ask("ps")["hosts"]
    assert sorted(host["device"] for host in listed) == sorted(host.ready["device"] for host in hosts)
    uuids = [host.ready["device"] for host in hosts]
    for visible, expected in (("1", 1), ("0", 0), ("1,0", 1), (uuids[1], 1), (f"{uuids[1]},{uuids[0]}", 1)):
        client = connect(CUDA_VISIBLE_DEVICES=visible)
        assert client("model = attach(path, device='cuda:0'); same(model, path)", path=str(path)), visible
        assert client("[m.handle.device for m in model._mappings]") == [uuids[expected]], visible
        assert client("[control.gpu_of(m.pointer) for m in model._mappings]") == [expected], visible
    by_uuid = connect()
    assert by_uuid(f"same(attach(path, device={uuids[1]!r}), path)", path=str(path))
    assert [host.ask("ps", "--device", f"cuda:{n}")["models"][0]["device"] for n, host in enumerate(hosts)] == uuids


def test_second_host_of_a_gpu_is_refused_whatever_it_calls_it(serve: Serve) -> None:
    first = serve("--device", "cuda:1")
    again = serve("--device", "cuda:0", CUDA_VISIBLE_DEVICES="1").ready["error"]
    assert again["code"] == "already_serving"
    assert str(first.pid) in again["message"]


def test_client_on_a_gpu_without_a_host_is_told_which_hosts_there_are(
    serve: Serve, connect: Connect, path: Path
) -> None:
    serve("--device", "cuda:1")
    there = r"there are hosts for cuda:1, Stand-in GPU 1 \(--device GPU-.*\); start one with: .*--device GPU-"
    with pytest.raises(HostUnavailable, match=there):
        connect()("attach(path, device='cuda:0')", path=str(path))


def test_client_that_does_not_see_the_hosts_gpu_is_told_both_names(
    serve: Serve, connect: Connect, path: Path
) -> None:
    host = serve("--device", "cuda:1")
    client = connect(CUDA_VISIBLE_DEVICES="0")
    with pytest.raises(WrongDevice, match=rf"{host.ready['device']}.*sees only cuda:0, Stand-in GPU 0 \(GPU-"):
        client("attach(path, endpoint=endpoint)", path=str(path), endpoint=host.ready["endpoint"])
    with pytest.raises(WrongDevice, match=r"of cuda:1, Stand-in GPU 1 .* cuda:0 is cuda:0, Stand-in GPU 0"):
        client("attach(path, endpoint=endpoint, device='cuda:0')")


# -- room --------------------------------------------------------------------------------------------------------------


def test_model_that_does_not_fit_is_refused_and_what_is_loaded_stays_served(
    serve: Serve, connect: Connect, models: Path, path: Path
) -> None:
    large = models / "large.safetensors"
    checkpoints.write(large, {"a": ("F32", (5 << 20,))})
    host = serve("--device", "cuda:0", LUNASHM_STANDIN_MEMORY=str(20 << 20))
    first = connect()
    assert first("model = attach(path, device='cuda:0'); same(model, path)", path=str(path))
    with pytest.raises(OutOfSharedMemory, match=r"does not fit on cuda:0 .*: .* needed, .* free of .*lunashm unload"):
        connect()("attach(path, device='cuda:0')", path=str(large))
    assert [model["name"] for model in host.ask("ps")["models"]] == ["m.safetensors"]
    assert connect()("same(attach(path, device='cuda:0'), path)", path=str(path))
    assert first("same(model, path)")


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_killed_host_on_vmm_is_survived_and_the_next_one_is_used(
    serve: Serve, connect: Connect, path: Path
) -> None:
    host = serve("--device", "cuda:0", "--memory", "cuda-vmm")
    client = connect()
    assert client("model = attach(path, device='cuda:0'); same(model, path)", path=str(path))
    host.kill()
    assert client("same(model, path)"), "mapped memory outlives the host"
    host.start()
    assert client("again = model.reattached(60.0); model.close(); del model; gc.collect(); same(again, path)")
    assert host.ask("ps")["models"][0]["clients"] == 1


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_host_that_ends_on_ipc_stops_its_clients_and_the_next_one_is_used(
    serve: Serve, connect: Connect, path: Path, end: str
) -> None:
    host = serve("--device", "cuda:0", "--memory", "cuda-ipc")
    client = connect()
    client("layer = torch.nn.Linear(1000, 300, bias=False)")
    assert client("model = attach(path, device='cuda:0'); same(model, path)", path=str(path))
    assert not client("model.lost")
    getattr(host, end)()
    for use in ("model.state_dict()", "model.check()", "model.checksum()"):
        with pytest.raises(HostLost, match=r"the host \(pid \d+\) (died|stopped).*attach again"):
            client(use)
    host.start()
    assert client("again = model.reattached(60.0); model.close(); del model; gc.collect(); same(again, path)")


@pytest.mark.parametrize("rung", RUNGS)
def test_killed_client_leaves_nothing_and_harms_nobody(
    serve: Serve, connect: Connect, path: Path, rung: str
) -> None:
    host = serve("--device", "cuda:0", "--memory", rung)
    first, second = connect(), connect()
    for client in (first, second):
        assert client("model = attach(path, device='cuda:0'); same(model, path)", path=str(path))
    first.kill()
    assert second("same(model, path)")
    assert [client["info"]["pid"] for client in host.ask("clients")["clients"]] == [second.pid]


@pytest.mark.parametrize("rung", RUNGS)
def test_a_hundred_attachments_leave_nothing_behind(serve: Serve, connect: Connect, path: Path, rung: str) -> None:
    host = serve("--device", "cuda:0", "--memory", rung)
    client = connect()
    client(
        """
def cycle(times):
    for _ in range(times):
        model = attach(path, device='cuda:0')
        assert model.state_dict()['b'].shape == (7, 5)
        model.close()
        del model
        gc.collect()

def counts():
    maps = [line for line in open('/proc/self/maps') if 'standin' in line]
    return len(os.listdir('/proc/self/fd')), len(maps), control.live()
""",
        path=str(path),
    )
    client("cycle(5)")
    before, host_before = client("counts()"), len(list(Path(f"/proc/{host.pid}/fd").iterdir()))
    client("cycle(100)")
    assert client("counts()") == before
    assert len(list(Path(f"/proc/{host.pid}/fd").iterdir())) == host_before
    assert host.ask("status")["hosts"][0]["leases"] == 0

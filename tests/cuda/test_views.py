"""What a host lends on a GPU, as tensors that are not the CPU's: the stand-in accelerator's, in place of CUDA's."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import checkpoints
from tests.cuda.conftest import Serve
from tests.standin.process import Died, Process

SPECS = {"weight": ("F32", (300, 1000)), "bias": ("F16", (7, 5)), "none": ("F32", (0, 3)), "scalar": ("BF16", ())}
_CLIENT = """
import gc, torch, torch_npu
from safetensors.torch import load_file
from torch_npu.views import install_views
install_views()
import lunashm.client
from tests.standin import control

def attach(path, device):
    return lunashm.client.attach(path, device=device)
"""


@pytest.fixture
def path(models: Path) -> Path:
    path = models / "m.safetensors"
    checkpoints.write(path, SPECS)
    return path


@pytest.fixture
def connect(runtime: Path) -> Iterator[Callable[..., Process]]:
    clients: list[Process] = []

    def start(**variables: str) -> Process:
        clients.append(Process(accelerator=True, LUNASHM_RUNTIME_DIR=str(runtime), **variables))
        clients[-1](_CLIENT)
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__()


def test_lent_weights_are_on_the_device_and_take_none_of_its_memory(
    serve: Serve, connect: Callable[..., Process], path: Path
) -> None:
    serve("--device", "cuda:0")
    client = connect()
    client("model = attach(path, 'cuda:0'); weights = model.state_dict(); file = load_file(path)", path=str(path))
    assert client("{str(tensor.device) for tensor in weights.values()}") == {"npu:0"}
    assert client("all(torch.equal(weights[name].cpu(), file[name]) for name in file)")
    assert client("[torch.npu.owns(weights[name]) for name in ('weight', 'bias', 'scalar')]") == [False, False, False]
    assert client("torch.npu.facts()['allocations'], torch.npu.facts()['to_device']") == (0, 0)
    assert client("control.gpu_of(weights['weight'].data_ptr())") == 0


def test_layer_computes_on_lent_weights(serve: Serve, connect: Callable[..., Process], path: Path) -> None:
    serve("--device", "cuda:0")
    client = connect()
    client("model = attach(path, 'cuda:0'); weight = model.state_dict()['weight']", path=str(path))
    client("x = torch.ones(2, 1000, device='npu:0'); result = torch.nn.functional.linear(x, weight)")
    assert client("torch.allclose(result.cpu(), x.cpu() @ load_file(path)['weight'].t())")
    with pytest.raises(RuntimeError, match="same device"):
        client("torch.nn.functional.linear(x.cpu(), weight)")


def test_write_into_lent_weights_ends_the_writer(serve: Serve, connect: Callable[..., Process], path: Path) -> None:
    serve("--device", "cuda:0")
    client, other = connect(), connect()
    for process in (client, other):
        process("model = attach(path, 'cuda:0'); weight = model.state_dict()['weight']", path=str(path))
    with pytest.raises(Died) as caught:
        client("weight.add_(1)")
    assert caught.value.signal == signal.SIGSEGV
    assert other("torch.equal(weight.cpu(), load_file(path)['weight'])")


def test_hosts_gpu_is_found_by_its_number_here(serve: Serve, connect: Callable[..., Process], path: Path) -> None:
    serve("--device", "cuda:1")
    client = connect(CUDA_VISIBLE_DEVICES="1,0")
    client("model = attach(path, 'cuda:0'); weight = model.state_dict()['weight']", path=str(path))
    assert client("str(weight.device), control.gpu_of(weight.data_ptr())") == ("npu:0", 1)
    assert client("(weight + torch.ones(1000, device='npu:0')).device.index") == 0


def test_lease_ends_with_the_last_tensor(serve: Serve, connect: Callable[..., Process], path: Path) -> None:
    host = serve("--device", "cuda:0")
    client = connect()
    client("model = attach(path, 'cuda:0'); part = model.state_dict()['weight'][3:5].t()", path=str(path))
    client("del model; gc.collect()")
    assert host.ask("ps", "--device", "cuda")["models"][0]["clients"] == 1
    assert client("control.live().get('mappings')") == 1
    client("del part; gc.collect()")
    assert client("control.live().get('mappings')") is None

"""The stand-in accelerator is as strict as a GPU where that matters: else tests that run on it would say little."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from tests.standin.process import Died, Process

MIB = 1 << 20
_SETUP = """
import copy, ctypes, gc, mmap, weakref, torch, torch_npu
from torch_npu.views import tensor_at
from tests.standin import control
from torch.nn import functional as F
torch.manual_seed(0)
npu = "npu:0"

class Owner:
    def __init__(self, nbytes, readable_only=False):
        self.memory = mmap.mmap(-1, nbytes)
        self.pointer = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        if readable_only:
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.pointer), nbytes, mmap.PROT_READ) == 0

def close(left, right):
    return torch.allclose(left.cpu().float(), right.cpu().float(), atol=3e-2)
"""


@pytest.fixture(scope="module")
def common() -> Iterator[Process]:
    """For tests that leave nothing behind; importing torch is what takes the time."""
    with _process() as process:
        yield process


def _process(**variables: str) -> Process:
    process = Process(accelerator=True, **variables)
    process(_SETUP)
    return process


# -- where tensors are -------------------------------------------------------------------------------------------------


def test_tensor_lies_on_its_device_in_the_drivers_memory(common: Process) -> None:
    for index in (0, 1):
        common(f"x = torch.zeros(10, device='npu:{index}')")
        assert common("(x.device.type, x.device.index, x.is_cpu)") == ("npu", index, False)
        assert common("control.gpu_of(x.data_ptr())") == index


def test_device_can_be_chosen_and_is_restored(common: Process) -> None:
    assert common("with torch.npu.device(1): x = torch.ones(2, device='npu')\nx.device.index") == 1
    assert common("torch.ones(2, device='npu').device.index") == 0
    with pytest.raises(RuntimeError, match="npu:7"):
        common("torch.ones(2, device='npu:7')")


def test_results_lie_in_the_drivers_memory_too(common: Process) -> None:
    common("x = torch.rand(2, 8, 6, 6, device=npu); w = torch.rand(4, 8, 3, 3, device=npu)")
    for result in (
        "x + 1", "x.sum()", "x.half()", "x @ x", "F.conv2d(x, w)", "F.group_norm(x, 2)",
        "F.interpolate(x, scale_factor=2)",
        "torch.cat([x, x])", "x.max(0).values", "x.nonzero()", "F.embedding(torch.tensor([1], device=npu), x[0, 0])",
        "F.scaled_dot_product_attention(x, x, x)", "torch.randperm(9, device=npu)", "x.to(torch.float8_e4m3fn)",
        "x.sort().indices", "torch.stack(x.unbind())", "x.cumsum(1)", "copy.deepcopy(x)",
    ):  # fmt: skip
        common(f"result = {result}")
        assert common("(result.device.index, control.gpu_of(result.data_ptr()))") == (0, 0), result


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_results_are_the_cpus(common: Process, dtype: str) -> None:
    common(f"x = torch.randn(2, 8, 6, 6).to(torch.{dtype}); d = x.to(npu); layer = torch.nn.Conv2d(8, 4, 3)")
    common(f"layer.to(torch.{dtype}); device_layer = copy.deepcopy(layer).to(npu); torch.set_grad_enabled(False)")
    assert common("close(device_layer(d), layer(x))")
    for expression in (
        "F.group_norm({0}, 2)", "F.scaled_dot_product_attention({0}, {0}, {0})", "{0}.softmax(1)",
        "F.interpolate({0}, scale_factor=2, mode='bilinear')", "{0}.transpose(1, 3)[1:, ::2].contiguous()",
    ):  # fmt: skip
        assert common(f"close({expression.format('d')}, {expression.format('x')})"), expression


def test_model_can_be_trained(common: Process) -> None:
    common("torch.set_grad_enabled(True); layer = torch.nn.Linear(3, 2, device=npu)")
    common("layer(torch.ones(4, 3, device=npu)).sum().backward()")
    assert common("str(layer.weight.grad.device), layer.bias.grad.tolist()") == ("npu:0", [4.0, 4.0])


def test_generator_of_the_device_repeats_itself(common: Process) -> None:
    common("g = torch.Generator(npu); first = torch.randn(5, generator=g.manual_seed(3), device=npu)")
    assert common("torch.equal(first, torch.randn(5, generator=g.manual_seed(3), device=npu))")
    assert common("str(g.device)") == "npu:0"


# -- mixing devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixture",
    [
        "d + x", "x + d", "d @ x", "torch.cat([d, x])", "F.linear(d, x)", "F.conv2d(d[None, None], x[None, None])",
        "d.add_(x)", "torch.where(d > 0, x, d)", "F.embedding(torch.tensor([1]), d)", "d + d.to('npu:1')",
        "torch.add(d, d, out=x)", "torch.lerp(d, d, x)", "x.add_(d)", "torch.addmm(d, d, x)",
    ],
)  # fmt: skip
def test_operands_on_different_devices_are_refused(common: Process, mixture: str) -> None:
    common("torch.set_grad_enabled(False); x = torch.ones(4, 4); d = x.to(npu)")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        common(mixture)


def test_scalars_of_the_cpu_and_indices_may_be_mixed_in_as_on_cuda(common: Process) -> None:
    common("d = torch.ones(4, 4, device=npu)")
    assert common("(d * torch.tensor(2.0)).sum().item()") == 32
    assert common("d[torch.tensor([0, 2])].shape[0]") == 2
    common("d[torch.tensor([0])] = 5")
    assert common("d.sum().item()") == 32


# -- nothing is copied -------------------------------------------------------------------------------------------------


def test_views_and_writes_in_place_reach_the_same_memory(common: Process) -> None:
    common("d = torch.arange(12, device=npu).view(3, 4); at = d.data_ptr()")
    common("d.t()[1:].mul_(2); d.unfold(1, 2, 2).add_(1); d.split(1)[0].zero_(); None")
    assert common("d.tolist()") == [[0, 0, 0, 0], [5, 11, 13, 15], [9, 19, 21, 23]]
    assert common("d.data_ptr() == at")


def test_out_arguments_are_written_and_resized(common: Process) -> None:
    common("d = torch.ones(3, 3, device=npu); out = torch.empty(0, device=npu); same = torch.add(d, 1, out=out)")
    assert common("same is out, out.shape == d.shape, out.sum().item()") == (True, True, 18)
    common("out.resize_(100, 100); None")
    assert common("control.gpu_of(out.data_ptr() + 39_999)") == 0


def test_operator_takes_memory_for_its_result_and_nothing_else(common: Process) -> None:
    common(f"x = torch.ones({8 * MIB}, device=npu); torch.npu.reset_peak_memory_stats(); before = torch.npu.facts()")
    common("y = x.add(1)")
    facts, before = common("torch.npu.facts()"), common("before")
    assert 0 <= facts["allocated_peak"] - before["allocated"] - 32 * MIB < 4096
    assert facts["largest"] == 32 * MIB
    assert (facts["to_device"], facts["from_device"]) == (0, 0)
    common("del x, y; torch.npu.empty_cache()")


def test_copies_to_the_device_and_back_are_counted(common: Process) -> None:
    common("torch.npu.reset_peak_memory_stats(); d = torch.ones(1000).to(npu); d.cpu(); d.to('npu:1'); d.clone(); None")
    facts = common("torch.npu.facts(0)")
    assert (facts["to_device"], facts["to_device_bytes"]) == (1, 4000)
    assert (facts["from_device"], facts["from_device_largest"]) == (2, 4000)


# -- how much there is -------------------------------------------------------------------------------------------------


def test_memory_runs_out_as_torch_says_it() -> None:
    with _process(LUNASHM_STANDIN_MEMORY=str(64 * MIB)) as process:
        process(f"x = torch.empty({40 * MIB}, dtype=torch.uint8, device=npu)")
        assert process("torch.npu.mem_get_info()") == (24 * MIB, 64 * MIB)
        with pytest.raises(torch.OutOfMemoryError, match=f"Tried to allocate {40 * MIB} bytes"):
            process("y = x + 1")
        assert process("torch.npu.facts()['ooms']") == 1
        process("del x; y = torch.empty(40 << 20, dtype=torch.uint8, device=npu)")  # what was cached makes room
        stats = process("torch.npu.memory_stats()")
        assert stats["active_bytes.all.current"] == stats["reserved_bytes.all.current"] == 40 * MIB
        process("del y")
        stats = process("torch.npu.memory_stats()")
        assert (stats["active_bytes.all.current"], stats["reserved_bytes.all.current"]) == (0, 40 * MIB)
        process("torch.npu.empty_cache()")
        assert process("torch.npu.mem_get_info(), control.live().get('allocations', 0)") == ((64 * MIB, 64 * MIB), 0)


def test_cache_is_used_again_and_pieces_grow_together(common: Process) -> None:
    common("gc.collect(); torch.npu.empty_cache(); before = torch.npu.memory_reserved()")
    common("kept = [torch.empty(n * 1000, device=npu) for n in range(1, 200)]; torch.npu.memory_reserved()")
    reserved = common("torch.npu.memory_reserved()")
    common("del kept[::2]; del kept[:]; kept = [torch.empty(n * 1000, device=npu) for n in range(199, 0, -1)]")
    assert common("torch.npu.memory_reserved()") <= reserved * 1.1
    common("del kept; torch.npu.empty_cache()")
    assert common("torch.npu.memory_reserved()") <= common("before")


# -- memory that is somebody else's ------------------------------------------------------------------------------------


def test_view_of_foreign_memory_keeps_its_owner_until_the_last_use_is_gone(common: Process) -> None:
    common("owner = Owner(4096); gone = weakref.ref(owner); before = torch.npu.facts()['allocated']")
    common("view = tensor_at(owner.pointer, torch.float16, (4, 8), owner, 1); pointer = owner.pointer; del owner")
    assert common("str(view.device), view.data_ptr() == pointer, view.shape == (4, 8)") == ("npu:1", True, True)
    assert common("view.untyped_storage().nbytes(), torch.npu.facts()['allocated'] - before") == (64, 0)
    common("part = view[1].t(); layer = torch.nn.Parameter(part, requires_grad=False); del view, part; gc.collect()")
    assert common("gone() is not None")
    common("del layer; gc.collect()")
    assert common("gone() is None")


def test_views_can_be_told_from_torchs_own_memory(common: Process) -> None:
    common("owner = Owner(4096); view = tensor_at(owner.pointer, torch.float32, (8,), owner); own = view.clone()")
    assert common("torch.npu.owns(view), torch.npu.owns(own), torch.npu.owns(own[3:])") == (False, True, True)


def test_write_into_memory_that_may_only_be_read_ends_the_process() -> None:
    with _process() as process:
        process("owner = Owner(4096, readable_only=True)")
        process("view = tensor_at(owner.pointer, torch.float32, (1024,), owner)")
        assert process("view.add(1).sum().item()") == 1024
        with pytest.raises(Died) as caught:
            process("view.add_(1)")
        assert caught.value.signal == signal.SIGSEGV


def test_page_locked_memory_is_known_as_such(common: Process) -> None:
    assert common("torch.ones(4).pin_memory().is_pinned(), torch.ones(4).is_pinned()") == (True, False)

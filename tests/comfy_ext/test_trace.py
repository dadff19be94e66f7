"""What the extension notices of a loader's work: which parameter is which stretch of the file, in which dtype."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_ext import trace
from comfy_ext.binding import make_private, shareable

trace.install_load_state_dict()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(4, 4)
        self.k = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path / "net.safetensors"
    save_file({"qk.weight": torch.randn(8, 4).half(), "qk.bias": torch.randn(8), "norm.mean": torch.randn(4)}, path)
    return path, load_file(path)


def slot(traced: trace.Trace, owner: torch.nn.Module, name: str) -> trace.Slot:
    return next(slot for slot in traced.slots if slot.owner is owner and slot.name == name)


def load(path: Path, tensors: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> tuple[trace.Trace, Net]:
    net = Net()
    with trace.Trace() as traced:
        traced.saw_file(trace.FileTensors(trace.FileIdentity.of(str(path)), tensors))
        net.load_state_dict(state, strict=False)
    return traced, net


def test_a_slice_is_recognised_with_its_offset_and_the_dtype_it_was_built_with(
    opened: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = opened
    weight = tensors["qk.weight"]
    traced, net = load(path, tensors, {"q.weight": weight[:4], "k.weight": weight[4:]})
    found = slot(traced, net.k, "weight")
    origin = shareable(found, traced)
    assert origin is not None
    assert (origin.name, origin.start, found.dtype) == ("qk.weight", 16, torch.float32)


def test_rebuilt_and_transposed_tensors_are_private(opened: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = opened
    weight = tensors["qk.weight"]
    traced, net = load(path, tensors, {"q.weight": weight[:4].T, "k.weight": weight[4:] * 2})
    assert shareable(slot(traced, net.q, "weight"), traced) is None
    assert shareable(slot(traced, net.k, "weight"), traced) is None


def test_a_module_converted_after_the_load_still_counts_if_it_is_the_same_in_that_dtype(
    opened: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = opened
    traced, net = load(path, tensors, {"q.weight": tensors["qk.weight"][:4], "k.weight": tensors["qk.weight"][4:]})
    net.float()
    net.k.weight = torch.nn.Parameter(net.k.weight.detach() + 1)
    assert shareable(slot(traced, net.q, "weight"), traced) is not None
    assert shareable(slot(traced, net.k, "weight"), traced) is None


def test_buffers_are_never_shared(opened: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = opened
    traced, net = load(path, tensors, {"norm.running_mean": tensors["norm.mean"]})
    assert shareable(slot(traced, net.norm, "running_mean"), traced) is None


def test_a_tensor_the_loader_wrote_to_is_private(opened: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = opened
    net = Net()
    with trace.Trace() as traced:
        traced.saw_file(trace.FileTensors(trace.FileIdentity.of(str(path)), tensors))
        weight = tensors["qk.weight"]
        weight.narrow(0, 4, 4)[:] = 0
        net.load_state_dict({"q.weight": weight[:4], "q.bias": tensors["qk.bias"][:4]}, strict=False)
    assert shareable(slot(traced, net.q, "weight"), traced) is None
    assert shareable(slot(traced, net.q, "bias"), traced) is not None


def test_a_parameter_tied_after_the_load_shows_what_it_was_tied_to(
    opened: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = opened
    traced, net = load(path, tensors, {"q.weight": tensors["qk.weight"][:4], "k.weight": tensors["qk.weight"][4:]})
    net.k.weight = net.q.weight
    origin = shareable(slot(traced, net.k, "weight"), traced)
    assert origin is not None and origin.start == 0


def test_parameters_that_a_pre_hook_renames_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "norm.safetensors"
    save_file({"weight_g": torch.randn(4, 1).half(), "weight_v": torch.randn(4, 4).half()}, path)
    tensors = load_file(path)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4, bias=False))
    with trace.Trace() as traced:
        traced.saw_file(trace.FileTensors(trace.FileIdentity.of(str(path)), tensors))
        layer.load_state_dict(dict(tensors), strict=False)
    assert {(s.name, s.dtype) for s in traced.slots} == {("original0", torch.float32), ("original1", torch.float32)}
    make_private(traced, [])
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
    assert all(traced.locate(parameter) is None for parameter in layer.parameters())


def test_quantised_checkpoints_are_refused_by_name(opened: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = opened
    file = trace.FileTensors(trace.FileIdentity.of(str(path)), tensors | {"q.comfy_quant": torch.zeros(1)})
    with pytest.raises(trace.UntraceableError, match=r"q\.comfy_quant"), trace.Trace() as traced:
        traced.saw_file(file)


def test_copies_of_a_tagged_dict_are_plain_dicts(opened: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = opened
    tagged = trace.TaggedStateDict(tensors)
    tagged.original = trace.FileTensors(trace.FileIdentity.of(str(path)), tensors)
    for other in (copy.copy(tagged), copy.deepcopy(tagged), pickle.loads(pickle.dumps(tagged))):
        assert type(other) is dict
        assert list(other) == list(tensors)


def test_without_a_trace_load_state_dict_copies_as_ever(opened: tuple[Path, dict[str, torch.Tensor]]) -> None:
    _, tensors = opened
    net = Net()
    before = net.q.weight.data_ptr()
    net.load_state_dict({"q.weight": tensors["qk.weight"][:4]}, strict=False)
    assert net.q.weight.data_ptr() == before
    assert net.q.weight.dtype == torch.float32

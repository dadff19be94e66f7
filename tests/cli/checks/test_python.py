from __future__ import annotations

import sys

import pytest

from lunashm.cli.checks import apart, python
from lunashm.cli.checks.check import State, Wanted

ON_GPU = Wanted(device="cuda:0")


def test_torch_here_is_ok_and_its_build_is_named():
    checks = {check.name: check for check in apart.run("python", Wanted())}
    assert {check.state for check in checks.values()} == {State.OK}, checks
    assert "imported in" in checks["torch"].detail
    assert checks["torch build"].detail.startswith("for C")


def test_torch_that_cannot_be_imported_fails_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    check = python.torch()
    assert check.state is State.FAIL
    assert "pip install torch" in check.fix
    assert python.build(Wanted()).state is State.SKIP


@pytest.mark.parametrize(
    ("wanted", "built", "hip", "newest", "state", "said"),
    [
        (Wanted(), "13.0", "", None, State.OK, "CPU memory only"),
        (Wanted(), "", "", None, State.OK, "for CPU"),
        (Wanted(), "", "", (13, 0), State.WARN, "cannot use a GPU's memory"),
        (Wanted(), "", "6.2", (13, 0), State.WARN, "for ROCm 6.2"),
        (Wanted(), "12.8", "", (12, 4), State.OK, "up to 12.4"),  # minor versions run on any driver of their major one
        (Wanted(), "13.0", "", (12, 4), State.WARN, "torch cannot use the GPU"),
        (ON_GPU, "13.0", "", (12, 4), State.FAIL, "torch cannot use the GPU"),
    ],
)
def test_the_build_is_held_against_the_driver(wanted, built, hip, newest, state, said):
    check = python.compare(wanted, built, hip, newest)
    assert check.state is state
    assert said in check.detail
    assert bool(check.fix) == (state is not State.OK)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_allocator_is_named_and_never_a_problem(name):
    check = python.allocator({name: "backend:cudaMallocAsync"})
    assert check.state is State.OK
    assert f"{name}=backend:cudaMallocAsync; does not matter" in check.detail
    assert "torch's own choice" in python.allocator({}).detail

"""Low-rank updates compute what (W + dW) x computes, whatever is stacked in whatever order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lunashm.client.lowrank import UnsupportedLayer, Update, inject

LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: torch.nn.Linear(24, 16),
    "linear without bias": lambda: torch.nn.Linear(24, 16, bias=False),
    "conv 3x3": lambda: torch.nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "conv 1d dilated": lambda: torch.nn.Conv1d(8, 12, 3, dilation=2),
}
STEPS = ("add", "scale rows", "scale columns", "halve")


def sample(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if isinstance(module, torch.nn.Linear):
        return torch.randn(2, 5, module.in_features, dtype=dtype)
    sizes = [9] * len(module.kernel_size)  # type: ignore[arg-type]
    return torch.randn(2, module.in_channels, *sizes, dtype=dtype)  # type: ignore[call-overload]


def random_update(shape: torch.Size, steps: list[str]) -> Update:
    update = Update(tuple(shape))
    for step in steps:
        if step == "add":
            update.add(torch.randn(shape[0], 3), torch.randn(3, *shape[1:]) * 0.1, factor=-0.7)
        elif step == "scale rows":
            update.scale_rows(torch.rand(shape[0]) + 0.5)
        elif step == "scale columns":
            update.scale_columns(torch.rand(shape[1]) + 0.5)
        else:
            update.scale_rows(0.5)
    return update


def reference(module: torch.nn.Module, update: Update, x: torch.Tensor) -> torch.Tensor:
    """The layer with W + dW, in float64."""
    merged = type(module).__new__(type(module))
    merged.__dict__ = dict(module.__dict__)
    merged._parameters = {
        name: None
        if p is None
        else torch.nn.Parameter((update.apply_to(p) if name == "weight" else p.detach()).double())
        for name, p in module._parameters.items()
    }
    with torch.no_grad():
        result: torch.Tensor = merged(x.double())
    return result


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(LAYERS)), st.lists(st.sampled_from(STEPS), max_size=6), st.integers(0, 1 << 20))
@torch.no_grad()
def test_any_stack_in_float32_is_exact_to_1e_5(kind: str, steps: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    module = LAYERS[kind]()
    x, update = sample(module), random_update(module.weight.shape, steps)  # type: ignore[arg-type]
    expected = reference(module, update, x)
    injection = inject(module, update)
    assert relative(module(x), expected) <= 1e-5
    injection.remove()


@torch.no_grad()
def test_embedding_looks_up_the_update_with_the_row() -> None:
    module = torch.nn.Embedding(20, 8)
    update = Update((20, 8))
    update.add(torch.randn(20, 2), torch.randn(2, 8))
    ids = torch.tensor([[1, 5, 5], [0, 19, 7]])
    expected = update.apply_to(module.weight)[ids]
    inject(module, update)
    torch.testing.assert_close(module(ids), expected)


@torch.no_grad()
def test_removal_restores_the_module_bit_for_bit_whatever_happened() -> None:
    module = torch.nn.Linear(24, 16)
    x = sample(module)
    before, attributes = module(x), set(module.__dict__)
    injections = [inject(module, random_update(module.weight.shape, ["add", "scale rows"])) for _ in range(2)]
    assert not torch.equal(module(x), before)
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 7))
    for injection in reversed(injections):
        injection.remove()
        injection.remove()
    assert torch.equal(module(x), before)
    assert set(module.__dict__) == attributes


def test_identity_leaves_the_module_alone() -> None:
    module = torch.nn.Linear(4, 4)
    update = Update((4, 4))
    update.add(torch.randn(4, 2), torch.randn(2, 4), factor=0.0)
    update.scale_rows(1.0)
    inject(module, update).remove()
    injection = inject(module, update)
    assert "forward" not in module.__dict__
    assert injection.nbytes == 0


@torch.no_grad()
def test_terms_are_kept_once_however_many_they_are() -> None:
    module = torch.nn.Linear(24, 16)
    update = random_update(module.weight.shape, ["add", "add", "add"])
    injection = inject(module, update)
    module(sample(module))
    assert injection.nbytes == update.rank * (24 + 16) * 4


def test_the_weight_is_never_written() -> None:
    module = torch.nn.Linear(24, 16)
    weight = module.weight.detach().clone()
    inject(module, random_update(module.weight.shape, ["add", "scale columns", "add"]))
    with torch.no_grad():
        module(sample(module))
    assert torch.equal(module.weight, weight)


def test_factors_that_do_not_fit_are_named_with_all_shapes() -> None:
    update = Update((16, 24))
    with pytest.raises(UnsupportedLayer, match=r"\[16, 2\] x \[2, 23\] do not fit a weight of \[16, 24\]"):
        update.add(torch.randn(16, 2), torch.randn(2, 23))
    assert update.is_identity


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Conv2d(4, 4, 3, groups=2),
        torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        torch.nn.LayerNorm(4),
    ],
    ids=["grouped", "reflecting", "norm"],
)
def test_layers_it_cannot_repeat_are_refused(module: torch.nn.Module) -> None:
    update = Update((4, 4, 3, 3))
    update.add(torch.randn(4, 1), torch.randn(1, 4, 3, 3))
    with pytest.raises(UnsupportedLayer):
        inject(module, update)
    assert "forward" not in module.__dict__

"""Low-rank updates compute what (W + dW) x computes, whatever is stacked in whatever order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lunashm.client.lowrank import Injection, UnsupportedLayer, Update, inject, injection

LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: torch.nn.Linear(24, 16),
    "linear without bias": lambda: torch.nn.Linear(24, 16, bias=False),
    "conv 3x3": lambda: torch.nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "conv 1d dilated": lambda: torch.nn.Conv1d(8, 12, 3, dilation=2),
    "conv grouped": lambda: torch.nn.Conv2d(8, 12, 3, groups=2),
    "conv reflecting": lambda: torch.nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
}
STEPS = ("add", "add to a part", "kronecker", "kronecker of a pair", "scale rows", "scale columns", "halve", "dense")

ALWAYS, NEVER = {"cpu": -(1 << 40)}, {"cpu": 1 << 40}
"""PASS_MACS with which the weight is made anew at every call, and at none."""


@pytest.fixture(params=["branch", "merged"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing the same thing."""
    monkeypatch.setattr(injection, "PASS_MACS", NEVER if request.param == "branch" else ALWAYS)
    return str(request.param)


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
        elif step == "add to a part":
            update.add(torch.randn(4, 2), torch.randn(2, *shape[1:]), rows=(2, 4))
            update.add(torch.randn(shape[0], 2), torch.randn(2, 3, *shape[2:]), 0.5, columns=(1, 3))
        elif step == "kronecker":
            update.add_kronecker(torch.randn(4, 2) * 0.3, torch.randn(shape[0] // 4, shape[1] // 2, *shape[2:]) * 0.3)
        elif step == "kronecker of a pair" and len(shape) == 2:
            pair = torch.randn(2, 3), torch.randn(3, shape[1] // 2) * 0.3
            update.add_kronecker(torch.randn(4, 2) * 0.3, pair, -0.5, rows=(3, 8))
        elif step == "dense":
            update.then(lambda weight: weight.roll(1, 0) * 0.9)
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


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(LAYERS)), st.lists(st.sampled_from(STEPS), max_size=6), st.integers(0, 1 << 20))
@torch.no_grad()
def test_any_stack_in_float32_is_exact_to_1e_5(way: str, kind: str, steps: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    module = LAYERS[kind]()
    x, update = sample(module), random_update(module.weight.shape, steps)  # type: ignore[arg-type]
    expected = reference(module, update, x)
    weight = module.weight
    injected = inject(module, update)
    assert relative(module(x), expected) <= 1e-5
    assert module.weight is weight
    injected.remove()


SIZES = (0.1, 1.0)
"""Of the update's output against the layer's own."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "steps", [("add",), ("add", "scale rows"), ("add", "kronecker", "scale columns")], ids="+".join
)
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv 3x3"])
@torch.no_grad()
def test_half_precision_is_as_close_as_merged_weights(
    way: str, kind: str, steps: tuple[str, ...], size: float, dtype: torch.dtype
) -> None:
    """Merged: W + dW in float32, rounded to the weight's dtype, as ComfyUI patches a layer."""
    torch.manual_seed(1)
    big = {"linear": (512, 384), "linear without bias": (384, 512), "conv 3x3": (64, 48)}[kind]
    module = torch.nn.Conv2d(*big, 3, padding=1) if "conv" in kind else torch.nn.Linear(*big, bias="out" not in kind)
    module = module.to(dtype)
    x = torch.randn(4, big[0], 12, 12, dtype=dtype) if "conv" in kind else torch.randn(400, big[0], dtype=dtype)
    update = Update(tuple(module.weight.shape))
    delta = module.weight.float().norm() * size
    for step in steps:
        rows, columns = module.weight.shape[0], module.weight[0].numel()
        if step == "add":
            up, down = torch.randn(rows, 16).to(dtype), torch.randn(16, columns).to(dtype)
            update.add(up, down, float(0.8 * delta / (up.float() @ down.float()).norm()))
        elif step == "kronecker":
            first, second = torch.randn(8, 8), torch.randn(rows // 8, big[0] // 8, *module.weight.shape[2:])
            update.add_kronecker(first, second, float(0.6 * delta / (first.norm() * second.norm())))
        elif step == "scale rows":
            update.scale_rows(torch.rand(rows) * 0.2 + 0.9)
        else:
            update.scale_columns(torch.rand(big[0]) * 0.2 + 0.9)
    exact = reference(module, update, x)
    merged = copy.deepcopy(module)
    merged.weight = torch.nn.Parameter(update.apply_to(module.weight).to(dtype))
    stock = relative(merged(x), exact)
    inject(module, update)
    assert relative(module(x), exact) <= 1.02 * stock, "2% of the error for chance"


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
def test_embedding_takes_scales_and_dense_steps_too() -> None:
    module = torch.nn.Embedding(20, 8)
    ids = torch.tensor([[1, 5, 5], [0, 19, 7]])
    update = Update((20, 8))
    update.add(torch.randn(20, 2), torch.randn(2, 8))
    update.scale_rows(torch.rand(20))
    update.scale_columns(torch.rand(8))
    expected = update.apply_to(module.weight)[ids]
    injected = inject(module, update)
    torch.testing.assert_close(module(ids), expected)
    update = Update((20, 8))
    update.then(lambda weight: weight + 1.0)
    injected.replace(update)
    torch.testing.assert_close(module(ids), module.weight[ids] + 1.0)


@torch.no_grad()
def test_an_update_can_be_replaced_and_taken_back() -> None:
    module = torch.nn.Linear(24, 16)
    x = sample(module)
    plain = module(x)
    first, second = (random_update(module.weight.shape, steps) for steps in (["add"], ["add", "halve"]))
    expected = reference(module, second, x)
    injected = inject(module, first)
    before = module(x)
    injected.replace(second)
    assert relative(module(x), expected) <= 1e-5
    injected.replace(first)
    assert torch.equal(module(x), before)
    injected.replace(Update((16, 24)))
    assert torch.equal(module(x), plain)


@torch.no_grad()
def test_removed_below_another_wrapper_it_does_nothing_any_more() -> None:
    module = torch.nn.Linear(24, 16)
    x = sample(module)
    plain = module(x)
    injected = inject(module, random_update(module.weight.shape, ["add", "scale rows"]))
    below = module.forward
    module.forward = lambda x: below(x) * 2  # type: ignore[method-assign]
    injected.remove()
    assert torch.equal(module(x), plain * 2)


@torch.no_grad()
def test_few_positions_take_the_branch_and_many_the_merged_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(320, 320)
    update = Update((320, 320))
    update.add(torch.randn(320, 16), torch.randn(16, 320))
    inject(module, update)
    merged: list[int] = []
    stock = Injection._merged

    def spy(self: Injection, x: torch.Tensor) -> torch.Tensor:
        merged.append(len(x))
        return stock(self, x)

    monkeypatch.setattr(Injection, "_merged", spy)
    for positions in (1, 77, 4096):
        module(torch.randn(positions, 320))
    assert merged == [4096]


@torch.no_grad()
def test_an_error_in_the_layer_leaves_its_weight_in_place(way: str) -> None:
    module = torch.nn.Linear(24, 16)
    weight = module.weight
    inject(module, random_update(module.weight.shape, ["add", "dense"]))
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 7))
    assert module.weight is weight


@torch.no_grad()
def test_removal_restores_the_module_bit_for_bit_whatever_happened() -> None:
    module = torch.nn.Linear(24, 16)
    x = sample(module)
    before, attributes = module(x), set(module.__dict__)
    injected = [inject(module, random_update(module.weight.shape, ["add", "scale rows"])) for _ in range(2)]
    assert not torch.equal(module(x), before)
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 7))
    for one in reversed(injected):
        one.remove()
        one.remove()
    assert torch.equal(module(x), before)
    assert set(module.__dict__) == attributes


def test_identity_leaves_the_module_alone() -> None:
    module = torch.nn.Linear(4, 4)
    update = Update((4, 4))
    update.add(torch.randn(4, 2), torch.randn(2, 4), factor=0.0)
    update.scale_rows(1.0)
    inject(module, update).remove()
    assert inject(module, update).nbytes == 0
    assert "forward" not in module.__dict__


@torch.no_grad()
def test_terms_are_kept_once_however_many_they_are() -> None:
    module = torch.nn.Linear(24, 16)
    update = random_update(module.weight.shape, ["add", "add", "add"])
    injected = inject(module, update)
    before = injected.nbytes
    module(sample(module))
    assert before == injected.nbytes == update.rank * (24 + 16) * 4


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


@torch.no_grad()
def test_a_kronecker_product_that_does_not_fit_is_named_with_both_shapes() -> None:
    update = Update((16, 24))
    with pytest.raises(UnsupportedLayer, match=r"\[16, 20\] does not fit a weight of \[16, 24\]"):
        update.add_kronecker(torch.randn(4, 4), torch.randn(4, 5))
    assert update.is_identity


@pytest.mark.parametrize("module", [torch.nn.LayerNorm(4), torch.nn.Linear(3, 4)], ids=["norm", "other shape"])
def test_a_module_without_such_a_weight_is_refused(module: torch.nn.Module) -> None:
    update = Update((4, 4))
    update.add(torch.randn(4, 1), torch.randn(1, 4))
    with pytest.raises(UnsupportedLayer, match=r"has no weight of \[4, 4\]"):
        inject(module, update)
    assert "forward" not in module.__dict__

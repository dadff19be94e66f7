"""LoRA files on models: exact, stacked in any order, all or nothing, and gone without a trace."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lunashm.client import attach, lora, lora_file
from lunashm.client.lora import AppliedLora, apply_lora
from lunashm.client.lowrank import Update, inject
from lunashm.errors import (
    InvalidLora,
    LoraError,
    LoraMismatch,
    LunashmError,
    ModelNotFound,
    UnsupportedFormat,
    UnsupportedLora,
)
from tests import checkpoints
from tests.hosting import Hosting

RANK = 3
Tensors = dict[str, torch.Tensor]


class Net(torch.nn.Module):
    """One layer of each kind that LoRAs touch, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(11, 8)
        self.conv_in = torch.nn.Conv1d(8, 12, 3, padding=1)
        self.attn = torch.nn.ModuleDict({"to_q": torch.nn.Linear(12, 10), "to_k": torch.nn.Linear(12, 10, bias=False)})
        self.norm = torch.nn.LayerNorm(10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.conv_in(self.tokens(ids).mT).mT
        return self.norm(self.attn["to_q"](x) * self.attn["to_k"](x))


IDS = torch.arange(11).reshape(1, 11)


@torch.no_grad()
def run(net: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = net(IDS)
    return result


def fresh(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().requires_grad_(False)


def kohya(seed: int, layers: tuple[str, ...] = ("conv_in", "attn.to_q", "attn.to_k"), alpha: float = 1.5) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in layers:
        out, *rest = fresh().get_submodule(name).weight.shape  # type: ignore[union-attr]
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, RANK, *[1] * (len(rest) - 1), generator=random)
        tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, *rest, generator=random) * 0.2
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def merged(net: Net, change: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What ``net`` computes with ``change`` merged into copies of its weights."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(change(name.removesuffix(".weight"), parameter.double()))
    return run(twin)


def delta(tensors: Tensors, layer: str, shape: torch.Size) -> torch.Tensor:
    key = f"lora_unet_{layer.replace('.', '_')}"
    if f"{key}.lora_up.weight" not in tensors:
        return torch.zeros(shape, dtype=torch.float64)
    up, down = (tensors[f"{key}.lora_{which}.weight"].double().flatten(1) for which in ("up", "down"))
    return float(tensors[f"{key}.alpha"]) / down.shape[0] * (up @ down).reshape(shape)


def close(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((ours - reference).norm() <= 1e-5 * reference.norm())


def state(net: torch.nn.Module) -> list[tuple[str, list[str]]]:
    """Every attribute of every module, by name."""
    return [(name, sorted(module.__dict__)) for name, module in net.named_modules()]


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    lora._cache.clear()


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -0.5, 2.0])
def test_kohya_file_computes_what_merged_weights_do(tmp_path: Path, strength: float) -> None:
    net, tensors = fresh(), kohya(1)
    before = run(net)
    with apply_lora([net], write(tmp_path / "a.safetensors", tensors), strength) as applied:
        assert close(run(net), merged(fresh(), lambda name, w: w + strength * delta(tensors, name, w.shape)))
        assert not torch.equal(run(net), before)
        assert sorted(applied.layers) == ["attn.to_k", "attn.to_q", "conv_in"]
    assert torch.equal(run(net), before)


def test_peft_file_with_embedding_and_configuration_computes_what_merged_weights_do(tmp_path: Path) -> None:
    net, key = fresh(), "base_model.model."
    a, b, e, f = torch.randn(RANK, 12), torch.randn(10, RANK), torch.randn(RANK, 11), torch.randn(8, RANK)
    tensors = {f"{key}attn.to_q.lora_A.weight": a, f"{key}attn.to_q.lora_B.weight": b,
               f"{key}tokens.lora_embedding_A": e, f"{key}tokens.lora_embedding_B": f}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": RANK}))
    apply_lora([net], write(tmp_path / "adapter_model.safetensors", tensors), 0.5)
    change = {"attn.to_q": b @ a, "tokens": (f @ e).t()}
    assert close(run(net), merged(fresh(), lambda name, w: w + change[name] if name in change else w))


def test_locon_in_cp_form_and_flat_convolutions_compute_what_merged_weights_do(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.Conv2d(6, 5, 1)).requires_grad_(False)
    up, mid, down = torch.randn(6, RANK, 1, 1), torch.randn(RANK, 2, 3, 3), torch.randn(2, 4, 1, 1)
    up1, down1 = torch.randn(5, RANK), torch.randn(RANK, 6)
    path = write(tmp_path / "a.safetensors", {
        "0.lora_up.weight": up, "0.lora_mid.weight": mid, "0.lora_down.weight": down, "0.alpha": torch.tensor(4.0),
        "1.lora_A.weight": down1, "1.lora_B.weight": up1,
    })  # fmt: skip
    x = torch.randn(2, 4, 7, 7)
    twin = copy.deepcopy(net)
    scale = 4.0 / 2  # alpha / rank of down
    twin[0].weight += scale * torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))
    twin[1].weight += (up1 @ down1)[:, :, None, None]
    apply_lora([net], path)
    assert close(net(x), twin(x))


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("shape", [(10,), (10, 1), (1, 12)], ids=["PEFT", "per output", "per input"])
def test_dora_computes_magnitude_times_direction(tmp_path: Path, shape: tuple[int, ...], strength: float) -> None:
    net, tensors = fresh(), kohya(1, ("attn.to_q",))
    magnitude = torch.rand(shape) + 0.5
    if len(shape) == 1:
        names = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight", "alpha": "alpha"}
        stored = {f"attn.to_q.{names[key.partition('.')[2]]}": tensor for key, tensor in tensors.items()}
        stored["attn.to_q.lora_magnitude_vector"] = magnitude
    else:
        stored = {**tensors, "lora_unet_attn_to_q.dora_scale": magnitude}
    apply_lora([net], write(tmp_path / "a.safetensors", stored), strength)

    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        if name != "attn.to_q":
            return w
        after = w + delta(tensors, name, w.shape)
        norm = after.norm(dim=0, keepdim=True) if shape == (1, 12) else after.norm(dim=1, keepdim=True)
        return w + strength * (magnitude.reshape(norm.shape) * after / norm - w)

    assert close(run(net), merged(fresh(), change))


@pytest.mark.parametrize("shape", [(12, 1, 1), (1, 8, 1)], ids=["per output", "per input"])
def test_dora_of_a_convolution_does_the_same(tmp_path: Path, shape: tuple[int, ...]) -> None:
    net, tensors, magnitude = fresh(), kohya(1, ("conv_in",)), torch.rand(shape) + 0.5
    stored = {**tensors, "lora_unet_conv_in.dora_scale": magnitude}
    apply_lora([net], write(tmp_path / "a.safetensors", stored))

    def change(name: str, w: torch.Tensor) -> torch.Tensor:
        after = w + delta(tensors, name, w.shape)
        return magnitude * after / after.norm(dim=(1, 2) if shape[0] > 1 else (0, 2), keepdim=True)

    assert close(run(net), merged(fresh(), lambda name, w: change(name, w) if name == "conv_in" else w))


def test_strength_0_is_no_lora_to_the_bit(tmp_path: Path) -> None:
    net = fresh()
    before = run(net)
    applied = apply_lora([net], write(tmp_path / "a.safetensors", kohya(1)), 0.0)
    assert torch.equal(run(net), before)
    applied.remove()
    assert state(net) == state(fresh())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_dtype_of_factors_does_not_matter(tmp_path: Path, dtype: torch.dtype) -> None:
    net, tensors = fresh(), {key: tensor.to(dtype) for key, tensor in kohya(1).items()}
    apply_lora([net], write(tmp_path / "a.safetensors", tensors))
    assert close(run(net), merged(fresh(), lambda name, w: w + delta(tensors, name, w.shape)))


def test_lora_applied_in_inference_mode_serves_gradients_too(tmp_path: Path) -> None:
    net = fresh()
    with torch.inference_mode():
        apply_lora([net], write(tmp_path / "a.safetensors", kohya(1)))
        run(net)
    net.tokens.weight.requires_grad_()
    net(IDS).square().sum().backward()
    assert net.tokens.weight.grad is not None


# -- stacks ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.sampled_from([1.0, -0.5, 0.0, 2.0])), min_size=1, max_size=10
    )
)
def test_any_sequence_of_applying_and_removing_leaves_exactly_what_is_applied(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int, float]]
) -> None:
    folder, net = tmp_path_factory.mktemp("loras"), fresh()
    plain, clean, weights = run(net), state(net), copy.deepcopy(net.state_dict())
    layers = [("conv_in", "attn.to_q"), ("attn.to_q", "attn.to_k"), ("attn.to_q",), ("conv_in", "attn.to_k")]
    files = [kohya(seed, names) for seed, names in enumerate(layers)]
    paths = [write(folder / f"{number}.safetensors", tensors) for number, tensors in enumerate(files)]
    on: list[tuple[int, float, AppliedLora]] = []
    for add, number, strength in steps:
        if add or not on:
            on.append((number, strength, apply_lora([net], paths[number], strength)))
        else:
            on.pop(number % len(on))[2].remove()
        expected = merged(
            fresh(), lambda name, w: w + sum((s * delta(files[n], name, w.shape) for n, s, _ in on), 0 * w)
        )
        assert close(run(net), expected)
    for _, _, applied in on:
        applied.remove()
        applied.remove()
        assert not applied.applied
    assert torch.equal(run(net), plain)
    assert state(net) == clean
    weights["calls"] = net.calls
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in weights.items())


def test_many_loras_on_a_layer_are_one_injection(tmp_path: Path) -> None:
    net = fresh()
    for seed in range(4):
        apply_lora([net], write(tmp_path / f"{seed}.safetensors", kohya(seed, ("attn.to_q",))))
    stack = lora._Stack.on(net.attn["to_q"])
    assert stack is not None
    assert stack.update.rank == 4 * RANK
    assert len(stack.terms) == 4
    net.attn["to_q"].__dict__.pop(lora._ATTRIBUTE)
    stack._injection.remove()
    assert state(net) == state(fresh())


def test_the_same_lora_twice_counts_twice_and_comes_off_once(tmp_path: Path) -> None:
    net, tensors = fresh(), kohya(1)
    path = write(tmp_path / "a.safetensors", tensors)
    first, second = apply_lora([net], path), apply_lora([net], path)
    assert close(run(net), merged(fresh(), lambda name, w: w + 2 * delta(tensors, name, w.shape)))
    first.remove()
    assert close(run(net), merged(fresh(), lambda name, w: w + delta(tensors, name, w.shape)))
    second.remove()
    assert state(net) == state(fresh())


def test_dora_below_another_lora_is_made_anew_when_that_goes(tmp_path: Path) -> None:
    """Each acts on what those before it made of the weight."""
    plain, dora = kohya(1, ("attn.to_q",)), kohya(2, ("attn.to_q",))
    dora["lora_unet_attn_to_q.dora_scale"] = torch.rand(10, 1) + 0.5
    one, two = write(tmp_path / "1.safetensors", plain), write(tmp_path / "2.safetensors", dora)
    net, alone = fresh(), fresh()
    below = apply_lora([net], one)
    apply_lora([net], two)
    apply_lora([alone], two)
    assert not close(run(net), run(alone))
    below.remove()
    assert torch.equal(run(net), run(alone))


def test_other_injections_below_stay_and_one_above_is_an_error(tmp_path: Path) -> None:
    net, path = fresh(), write(tmp_path / "a.safetensors", kohya(1))
    update = Update((10, 12))
    update.add(torch.randn(10, 1), torch.randn(1, 12))
    below = inject(net.attn["to_q"], update)
    expected = run(net)
    applied = apply_lora([net], path)
    above = inject(net.attn["to_q"], update)
    with_all = run(net)
    with pytest.raises(LoraError, match="wrapped by something else"):
        applied.remove()
    with pytest.raises(LoraError, match="wrapped by something else"):
        apply_lora([net], path)
    assert applied.applied
    assert torch.equal(run(net), with_all)
    above.remove()
    applied.remove()
    assert torch.equal(run(net), expected)
    below.remove()
    assert state(net) == state(fresh())


def test_model_that_goes_takes_its_loras_along(tmp_path: Path) -> None:
    net = fresh()
    applied = apply_lora([net], write(tmp_path / "a.safetensors", kohya(1)))
    run(net)
    gone = weakref.ref(net.attn["to_q"])
    del net
    gc.collect()
    assert gone() is None
    applied.remove()


# -- errors ------------------------------------------------------------------------------------------------------------


def bad_files() -> dict[str, tuple[Tensors, type[LunashmError], str]]:
    good = kohya(1)
    up = "lora_unet_attn_to_k.lora_up.weight"
    down = "lora_unet_attn_to_k.lora_down.weight"
    norm = {"norm.lora_A.weight": torch.randn(RANK, 10), "norm.lora_B.weight": torch.randn(10, RANK)}
    return {
        "rows": ({**good, up: torch.randn(11, RANK)}, LoraMismatch, rf"bad.safetensors.*{down}.*\[11, 3\] x \[3, 12\]"),
        "columns": ({**good, down: torch.randn(RANK, 13)}, LoraMismatch, r"\[3, 13\].*weight of \[10, 12\]"),
        "kernel": (
            {**good, "lora_unet_conv_in.lora_down.weight": torch.randn(RANK, 8, 5)},
            LoraMismatch,
            r"\[3, 8, 5\].*\[12, 8, 3\]",
        ),
        "magnitude": (
            {**good, "lora_unet_attn_to_k.dora_scale": torch.rand(7, 1)},
            LoraMismatch,
            r"magnitudes.*\[7, 1\].*\[10, 12\]",
        ),
        "nan": ({**good, up: torch.full((10, RANK), math.nan)}, InvalidLora, f"NaN.*{up}"),
        "kind": ({**good, "lora_unet_x.lokr_w1": torch.randn(2, 2)}, UnsupportedLora, "LoKr"),
        "norm": ({**good, **norm}, UnsupportedLora, "bad.safetensors: norm.lora_A.weight cannot be applied"),
        "scaled embedding": (
            {
                **good, "tokens.lora_embedding_A": torch.randn(RANK, 11),
                "tokens.lora_embedding_B": torch.randn(8, RANK), "tokens.lora_magnitude_vector": torch.rand(11),
            },
            UnsupportedLora,
            "tokens.lora_embedding_A cannot be applied",
        ),
        "other model": ({k.replace("attn", "mlp").replace("conv", "x"): v for k, v in good.items()}, LoraMismatch,
                        "for another model: none of its 3 layers is in Net: lora_unet_"),
        "two names": ({**good, **{k.replace("unet", "transformer"): v for k, v in good.items()}}, LoraMismatch,
                      "bad.safetensors: .* both mean "),
        "nothing": ({"conv_in.weight": torch.zeros(2)}, InvalidLora, "holds no LoRA"),
    }  # fmt: skip


@pytest.mark.parametrize("which", bad_files())
@pytest.mark.parametrize("stacked", [False, True], ids=["on a fresh model", "on one with a LoRA"])
def test_whatever_is_wrong_leaves_the_model_as_it_was(tmp_path: Path, which: str, stacked: bool) -> None:
    tensors, error, words = bad_files()[which]
    net = fresh()
    if stacked:
        applied = apply_lora([net], write(tmp_path / "good.safetensors", kohya(2)))
    before, attributes = run(net), state(net)
    with pytest.raises(error, match=words):
        apply_lora([net], write(tmp_path / "bad.safetensors", tensors))
    assert torch.equal(run(net), before)
    assert state(net) == attributes
    if stacked:
        applied.remove()
        assert state(net) == state(fresh())


def test_error_while_the_last_layer_is_changed_undoes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = fresh()
    applied = apply_lora([net], write(tmp_path / "good.safetensors", kohya(2)))
    before, calls = run(net), 0

    def fails(layer: torch.nn.Module, update: Update) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no memory")
        return inject(layer, update)

    monkeypatch.setattr(lora, "inject", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        apply_lora([net], write(tmp_path / "a.safetensors", kohya(1)))
    assert torch.equal(run(net), before)
    applied.remove()
    assert state(net) == state(fresh())


def test_missing_file_pickle_and_strength_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no LoRA at"):
        apply_lora([fresh()], tmp_path / "missing.safetensors")
    (tmp_path / "a.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedFormat):
        apply_lora([fresh()], tmp_path / "a.pt")
    path = write(tmp_path / "a.safetensors", kohya(1))
    for strength in (math.nan, math.inf):
        with pytest.raises(ValueError, match="strength"):
            apply_lora([fresh()], path, strength)


def test_names_that_mean_no_layer_are_one_warning_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"lora_te_x_{n}.lora_{which}.weight": torch.ones(2, 2) for n in range(8) for which in ("up", "down")}
    path = write(tmp_path / "a.safetensors", {**kohya(1), **extra, "bundle_emb.x": torch.ones(1)})
    with caplog.at_level(logging.WARNING):
        applied = apply_lora([fresh()], path)
    assert len(caplog.records) == 1
    assert "9 of its names mean no layer of this model: lora_te_x_0, " in caplog.text
    assert "and 4 more" in caplog.text
    assert len(applied.unmatched) == 9
    caplog.clear()
    apply_lora([fresh()], write(tmp_path / "b.safetensors", kohya(1)))
    apply_lora([fresh()], write(tmp_path / "c.safetensors", {**kohya(1), **extra}), prefix="unet")
    assert caplog.records == []


# -- files are read once -----------------------------------------------------------------------------------------------


def test_file_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(lora._cache, "_read", lambda path: reads.append(path) or lora_file.read(path))
    net, path = fresh(), write(tmp_path / "a.safetensors", kohya(1))
    for _ in range(3):
        apply_lora([net], path).remove()
    assert len(reads) == 1
    tensors = kohya(2)
    write(path, tensors)
    checkpoints.touch(path)
    apply_lora([net], path)
    assert len(reads) == 2
    assert close(run(net), merged(fresh(), lambda name, w: w + delta(tensors, name, w.shape)))


def test_cached_factors_are_not_changed_by_use(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(1))
    for strength in (0.3, -2.0):
        net = fresh()
        apply_lora([net], path, strength)
        run(net)
    for factors in lora._cache.get(path).layers.values():
        assert torch.equal(factors.down, kohya(1)[factors.key])
        assert torch.equal(factors.up, kohya(1)[factors.key.replace("down", "up")])


# -- through an attachment ---------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(hosting: Hosting) -> Path:
    return write(hosting.root / "net.safetensors", dict(fresh().state_dict()))


def empty() -> Net:
    with torch.device("meta"):
        return Net().requires_grad_(False)


def test_parameters_are_the_shared_bytes_and_buffers_are_not(checkpoint: Path) -> None:
    net = empty()
    with attach(checkpoint) as model:
        model.load_into(net)
        tensors = model.state_dict()
    assert all(p.data_ptr() == tensors[name].data_ptr() for name, p in net.named_parameters())
    assert torch.equal(run(net), run(fresh()))  # which writes to a buffer
    assert (net.calls, tensors["calls"]) == (1, 0)


def test_part_of_a_checkpoint_is_loaded_by_its_prefix(hosting: Hosting) -> None:
    state_dict = {f"unet.{name}": tensor for name, tensor in fresh().state_dict().items()}
    net = empty()
    with attach(write(hosting.root / "all.safetensors", {**state_dict, "vae.x": torch.ones(2)})) as model:
        model.load_into(net, "unet.")
    assert torch.equal(run(net), run(fresh()))


def test_module_that_takes_copies_is_an_error(checkpoint: Path) -> None:
    class Copies(Net):
        def load_state_dict(self, state_dict, strict=True, assign=False):  # type: ignore[no-untyped-def]
            return super().load_state_dict({name: t.clone() for name, t in state_dict.items()}, strict, assign)

    net = Copies()
    with attach(checkpoint) as model:
        with pytest.raises(LunashmError, match=r"\d+ parameters of Copies are copies, not net.safetensors's bytes"):
            model.load_into(net)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_into(torch.nn.Linear(3, 3))
        with pytest.raises(LunashmError, match="load_into"):
            model.apply_lora("a.safetensors")


def test_two_clients_with_different_loras_get_their_own_results_and_change_no_shared_byte(
    checkpoint: Path, tmp_path: Path
) -> None:
    files = [kohya(1), kohya(2)]
    paths = [write(tmp_path / f"{number}.safetensors", tensors) for number, tensors in enumerate(files)]
    models, nets = [attach(checkpoint), attach(checkpoint)], [empty(), empty()]
    for model, net in zip(models, nets, strict=True):
        model.load_into(net)
    assert nets[0].conv_in.weight.data_ptr() == nets[1].conv_in.weight.data_ptr()
    checksum = models[0].checksum()
    applied = [model.apply_lora(path, 0.7) for model, path in zip(models, paths, strict=True)]
    for net, path, tensors in zip(nets, paths, files, strict=True):
        alone = fresh()
        apply_lora([alone], path, 0.7)
        assert torch.equal(run(net), run(alone))  # shared or private: the same bits
        assert close(run(net), merged(fresh(), lambda name, w: w + 0.7 * delta(tensors, name, w.shape)))  # noqa: B023
    assert not close(run(nets[0]), run(nets[1]))
    applied[0].remove()
    assert torch.equal(run(nets[0]), run(fresh()))
    assert not close(run(nets[1]), run(fresh()))
    assert [model.checksum() for model in models] == [checksum] * 2
    assert load_file(checkpoint)["calls"] == 0
    for model in models:
        model.close()


def test_lora_goes_to_whatever_was_loaded_and_is_still_there(checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(1))
    with attach(checkpoint) as model:
        with pytest.raises(LunashmError, match="or say module="):
            model.apply_lora(path)
        gone, net, other = empty(), empty(), fresh()
        for module in (gone, net, net):
            model.load_into(module)
        with pytest.raises(LoraMismatch, match="say which module="):
            model.apply_lora(path)
        del gone, module
        gc.collect()
        model.apply_lora(path).remove()
        assert state(net) == state(fresh())
        with model.apply_lora(path, module=other):
            assert torch.equal(run(net), run(fresh()))
            assert not close(run(other), run(fresh()))
    assert torch.equal(run(other), run(fresh()))


def test_local_copy_takes_loras_too(hosting: Hosting, checkpoint: Path, tmp_path: Path) -> None:
    hosting.stop()
    net, tensors = empty(), kohya(1)
    with attach(checkpoint, fallback="local") as model:
        model.load_into(net)
        model.apply_lora(write(tmp_path / "a.safetensors", tensors))
    assert close(run(net), merged(fresh(), lambda name, w: w + delta(tensors, name, w.shape)))

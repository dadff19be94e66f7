"""Every way in which LoRA files name things, and what is wrong with files that are refused."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lunashm.client import lora_file
from lunashm.client.lora_scale import Scales
from lunashm.errors import InvalidLora, ModelNotFound, UnsupportedFormat, UnsupportedLora

UP, DOWN = torch.randn(6, 2), torch.randn(2, 4)


def parsed(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> lora_file.LoraFile:
    return lora_file.parse("style.safetensors", tensors, metadata or {})


@pytest.mark.parametrize(
    ("down", "up", "layer"),
    [
        ("lora_unet_a_b.lora_down.weight", "lora_unet_a_b.lora_up.weight", "lora_unet_a_b"),
        ("lora_te1_a.lora_down.weight", "lora_te1_a.lora_up.weight", "lora_te1_a"),
        ("diffusion_model.a.lora_down.weight", "diffusion_model.a.lora_up.weight", "diffusion_model.a"),
        ("base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight", "base_model.model.a.b"),
        ("base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_B.default.weight", "base_model.model.a"),
        ("transformer.a.lora_A.weight", "transformer.a.lora_B.weight", "transformer.a"),
        ("transformer.a.lora_A", "transformer.a.lora_B", "transformer.a"),
        ("unet.a.lora.down.weight", "unet.a.lora.up.weight", "unet.a"),
        ("text_encoder.a.q_proj.lora_linear_layer.down.weight", "text_encoder.a.q_proj.lora_linear_layer.up.weight",
         "text_encoder.a.q_proj"),
        ("unet.attn1.processor.to_q_lora.down.weight", "unet.attn1.processor.to_q_lora.up.weight", "unet.attn1.to_q"),
        ("attn2.processor.to_out_lora.down.weight", "attn2.processor.to_out_lora.up.weight", "attn2.to_out.0"),
        ("text_encoder.h.0.self_attn.to_k_lora.down.weight", "text_encoder.h.0.self_attn.to_k_lora.up.weight",
         "text_encoder.h.0.self_attn.k_proj"),
        ("text_encoder.h.0.self_attn.to_out_lora.down.weight", "text_encoder.h.0.self_attn.to_out_lora.up.weight",
         "text_encoder.h.0.self_attn.out_proj"),
        ("unet.attn1.to_out.lora_A.weight", "unet.attn1.to_out.lora_B.weight", "unet.attn1.to_out"),
    ],
)  # fmt: skip
def test_every_style_names_its_layer_and_both_factors(down: str, up: str, layer: str) -> None:
    file = parsed({up: UP, down: DOWN})
    assert list(file.layers) == [layer]
    assert torch.equal(file.layers[layer].up, UP)
    assert torch.equal(file.layers[layer].down, DOWN)
    assert file.unknown == ()


def test_alpha_mid_and_magnitude_belong_to_their_layer() -> None:
    mid, magnitude = torch.randn(2, 2, 3, 3), torch.rand(6, 1, 1, 1)
    file = parsed(
        {
            "lora_unet_c.lora_up.weight": UP[:, :, None, None],
            "lora_unet_c.lora_down.weight": DOWN[:, :, None, None],
            "lora_unet_c.lora_mid.weight": mid,
            "lora_unet_c.alpha": torch.tensor(3.0),
            "lora_unet_c.dora_scale": magnitude,
        }
    )
    factors = file.layers["lora_unet_c"]
    assert (factors.alpha, factors.rank) == (3.0, 2)
    assert factors.mid is mid
    assert factors.magnitude is magnitude
    assert file.nbytes == sum(t.nbytes for t in (UP, DOWN, mid, magnitude))


@pytest.mark.parametrize("end", ["", ".weight", ".default", ".default.weight"])
def test_peft_magnitudes_are_per_output_whatever_their_shape(end: str) -> None:
    key = f"base_model.model.c.lora_magnitude_vector{end}"
    file = parsed({"base_model.model.c.lora_A.weight": DOWN, "base_model.model.c.lora_B.weight": UP,
                   key: torch.rand(1, 6, 1, 1)})  # fmt: skip
    magnitude = file.layers["base_model.model.c"].magnitude
    assert magnitude is not None
    assert magnitude.shape == (6,)


def test_peft_embeddings_are_turned_over() -> None:
    file = parsed({"base_model.model.e.lora_embedding_A": torch.randn(2, 9),
                   "base_model.model.e.lora_embedding_B": torch.randn(5, 2)})  # fmt: skip
    factors = file.layers["base_model.model.e"]
    assert (factors.up.shape, factors.down.shape) == ((9, 2), (2, 5))


def test_unknown_keys_and_alphas_without_factors_are_kept_by_name() -> None:
    file = parsed({"a.lora_up.weight": UP, "a.lora_down.weight": DOWN, "b.alpha": torch.tensor(1.0),
                   "bundle_emb.x": UP})  # fmt: skip
    assert sorted(file.unknown) == ["b.alpha", "bundle_emb.x"]
    assert list(file.layers) == ["a"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("a.hada_w1_a", "LoHa"), ("a.lokr_w1", "LoKr"), ("a.oft_blocks", "OFT"), ("a.boft_R.default", "OFT or BOFT"),
        ("a.a1.weight", "GLoRA"), ("a.lora_E", "AdaLoRA"), ("a.on_input", "IA3"), ("a.diff", "full difference"),
        ("a.diff_b", "full difference"), ("a.w_norm", "norm difference"), ("a.lora_B.bias", "with a bias"),
        ("a.lora_B.default.bias", "with a bias"), ("a.reshape_weight", "reshapes"),
        ("base_model.model.head.weight", "replaces the model's"),
    ],
)  # fmt: skip
def test_what_has_no_form_here_is_refused_by_kind_beside_good_layers(key: str, kind: str) -> None:
    with pytest.raises(UnsupportedLora, match=kind) as error:
        parsed({"x.lora_up.weight": UP, "x.lora_down.weight": DOWN, key: UP})
    assert key in error.value.message


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no LoRA"),
        ({"conv_in.weight": UP}, r"holds no LoRA.*conv_in.weight"),
        ({"a.alpha": torch.tensor(1.0)}, "holds no LoRA"),
        ({"a.lora_down.weight": DOWN}, "a has no up factor"),
        ({"a.lora_B.weight": UP}, "a has no down factor"),
        ({"a.lora_mid.weight": UP}, "no down and no up"),
        ({"a.lora_down.weight": DOWN, "a.lora_up.weight": torch.randn(6, 3)}, r"\[6, 3\] x \[2, 4\]"),
        ({"a.lora_down.weight": DOWN[0], "a.lora_up.weight": UP}, "do not fit each other"),
        ({"a.lora_down.weight": DOWN, "a.lora_up.weight": torch.randn(6, 2, 3, 3)}, "do not fit each other"),
        ({"a.lora_down.weight": DOWN, "a.lora_up.weight": UP, "a.lora_mid.weight": torch.randn(3, 2, 3, 3)}, "fit"),
        ({"a.lora_down.weight": DOWN, "a.lora_up.weight": UP, "a.alpha": torch.randn(2)}, "one number"),
        ({"a.lora_A.x.weight": DOWN, "a.lora_A.y.weight": DOWN, "a.lora_B.x.weight": UP}, "same factor"),
    ],
)
def test_file_that_is_no_whole_lora_is_refused(tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(InvalidLora, match=words) as error:
        parsed(tensors)
    assert "style.safetensors" in error.value.message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_named_with_file_and_keys(bad: float, dtype: torch.dtype) -> None:
    up = UP.to(dtype, copy=True)
    up[3, 1] = bad
    with pytest.raises(InvalidLora, match=r"style.safetensors: 1 of 4 tensors.*: a.lora_up.weight$"):
        parsed({"a.lora_up.weight": up, "a.lora_down.weight": DOWN, "b.lora_up.weight": UP, "b.lora_down.weight": DOWN})


def test_long_lists_of_names_are_cut() -> None:
    assert lora_file.listed(map(str, range(7))) == "0, 1, 2, 3, 4 and 2 more"
    assert lora_file.listed(["a"], " (", ")") == " (a)"
    assert lora_file.listed([], " (", ")") == ""


def test_read_gives_copies_that_no_later_write_reaches(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a.lora_up.weight": UP, "a.lora_down.weight": DOWN.half()}
    save_file(tensors, path)
    file = lora_file.read(str(path))
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(file.layers["a"].up, UP)
    assert torch.equal(file.layers["a"].down, DOWN.half())


def test_pickles_missing_and_damaged_files_are_refused(tmp_path) -> None:
    for name in ("a.pt", "a.bin", "a.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(print))
        with pytest.raises(UnsupportedFormat, match="pickles are not opened"):
            lora_file.read(str(tmp_path / name))
    with pytest.raises(ModelNotFound):
        lora_file.read(str(tmp_path / "none.safetensors"))
    (tmp_path / "a.safetensors").write_bytes(b"12345678 no header")
    with pytest.raises(InvalidLora, match="damaged"):
        lora_file.read(str(tmp_path / "a.safetensors"))


# -- scales ------------------------------------------------------------------------------------------------------------


def scale(file: lora_file.LoraFile, path: object = "style.safetensors") -> dict[str, float]:
    scales = Scales.of(file, str(path))
    return {layer: scales.of_layer(layer, factors) for layer, factors in file.layers.items()}


def peft(*layers: str, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{layer}.lora_{which}.weight": t for layer in layers for which, t in (("A", DOWN), ("B", UP))}


def test_alpha_of_the_key_counts_before_any_configuration() -> None:
    tensors = {**peft("unet.a", "unet.b"), "unet.a.alpha": torch.tensor(1.0)}
    config = {"unet.lora_alpha": 8, "unet.r": 2}
    assert scale(parsed(tensors, {"lora_adapter_metadata": json.dumps(config)})) == {"unet.a": 0.5, "unet.b": 4.0}


def test_without_any_alpha_the_scale_is_one() -> None:
    assert scale(parsed(peft("a"))) == {"a": 1.0}


def test_diffusers_metadata_is_per_component_with_patterns() -> None:
    config = {
        "unet.lora_alpha": 4, "unet.alpha_pattern": {"mid.*to_q": 6, r"to_.": 2},
        "text_encoder.lora_alpha": 1, "text_encoder.use_rslora": True,
    }  # fmt: skip
    layers = ("unet.mid.x.to_q", "unet.down.to_q", "unet.proj", "text_encoder.fc", "other.a")
    assert scale(parsed(peft(*layers), {"lora_adapter_metadata": json.dumps(config)})) == {
        "unet.mid.x.to_q": 3.0, "unet.down.to_q": 1.0, "unet.proj": 2.0,
        "text_encoder.fc": pytest.approx(1 / math.sqrt(2)), "other.a": 1.0,
    }  # fmt: skip


def test_metadata_without_components_is_for_all() -> None:
    assert scale(parsed(peft("a"), {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "r": 2})})) == {"a": 2.0}


def test_peft_configuration_is_read_beside_its_file(tmp_path) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 16, "r": 2, "alpha_pattern": {"fc1": 2}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = parsed(peft("h.fc1", "h.fc2", prefix="base_model.model."))
    expected = {"base_model.model.h.fc1": 1.0, "base_model.model.h.fc2": 8.0}
    assert scale(file, tmp_path / "anything.safetensors") == expected
    assert scale(parsed(peft("h.fc2")), tmp_path / "adapter_model.safetensors") == {"h.fc2": 8.0}


def test_configuration_beside_a_file_that_peft_did_not_write_is_another_files(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16}))
    assert scale(parsed(peft("unet.a")), tmp_path / "style.safetensors") == {"unet.a": 1.0}
    kohya = {"lora_unet_a.lora_up.weight": UP, "lora_unet_a.lora_down.weight": DOWN}
    assert scale(parsed(kohya), tmp_path / "adapter_model.safetensors") == {"lora_unet_a": 1.0}


@pytest.mark.parametrize("text", ["{", "[1]", '{"lora_alpha": "much"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 2}}'])
def test_configuration_that_makes_no_sense_is_an_error(text: str) -> None:
    with pytest.raises(InvalidLora, match="configuration cannot be read"):
        scale(parsed(peft("a"), {"lora_adapter_metadata": text}))

"""A name in a LoRA file means one layer, or it is said that it does not."""

from __future__ import annotations

import pytest
import torch

from lunashm.client.lora_names import match
from lunashm.errors import LoraMismatch


def model(*names: str) -> torch.nn.Module:
    """Linear layers under dotted names, and a norm that has no weight."""
    root = torch.nn.Module()
    for name in names:
        here = root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in here._modules:
                here.add_module(parent, torch.nn.Module())
            here = here.get_submodule(parent)
        here.add_module(last, torch.nn.Linear(2, 2))
    root.add_module("norm", torch.nn.LayerNorm(2, elementwise_affine=False))
    return root


UNET = ("down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0", "proj_in")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q", "down_blocks.0.attn1.to_q"),
        ("lora_unet_down_blocks_0_attn1_to_out_0", "down_blocks.0.attn1.to_out.0"),
        ("lycoris_proj_in", "proj_in"),
        ("lora_transformer_proj_in", "proj_in"),
        ("unet.down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_q"),
        ("transformer.proj_in", "proj_in"),
        ("diffusion_model.proj_in", "proj_in"),
        ("base_model.model.proj_in", "proj_in"),
        ("base_model.model.unet.proj_in", "proj_in"),
        ("proj_in", "proj_in"),
    ],
)
def test_every_style_finds_its_layer(name: str, layer: str) -> None:
    unet = model(*UNET)
    found = match([name], [unet]).layers[name]
    assert found.name == layer
    assert found.module is unet.get_submodule(layer)


def test_what_means_no_layer_is_unmatched() -> None:
    names = ["lora_unet_gone", "unet.gone", "norm", "down_blocks", "proj_in"]
    matches = match(names, [model(*UNET)])
    assert list(matches.layers) == ["proj_in"]
    assert matches.unmatched == tuple(names[:-1])


def test_literal_name_counts_before_a_shortened_one() -> None:
    found = match(["transformer.h", "h"], [model("transformer.h", "h")])
    assert {name: layer.name for name, layer in found.layers.items()} == {"transformer.h": "transformer.h", "h": "h"}


def test_level_that_newer_transformers_lack_is_left_out() -> None:
    names = ["lora_te_text_model_encoder_fc1", "text_encoder.text_model.encoder.fc2"]
    found = match(names, [model("encoder.fc1", "encoder.fc2")])
    assert [layer.name for layer in found.layers.values()] == ["encoder.fc1", "encoder.fc2"]
    assert match(names, [model("text_model.encoder.fc1", "text_model.encoder.fc2")]).unmatched == ()


def test_kohya_name_that_two_layers_share_is_an_error() -> None:
    both = model("a_b.c", "a.b_c")
    with pytest.raises(LoraMismatch, match=r"2 layers \(a_b.c, a.b_c\)"):
        match(["lora_unet_a_b_c"], [both])
    assert match(["a.b_c"], [both]).layers["a.b_c"].name == "a.b_c"


def test_name_that_two_models_have_is_an_error() -> None:
    with pytest.raises(LoraMismatch, match="module="):
        match(["conv_in"], [model("conv_in"), model("conv_in")])


def test_models_that_share_a_layer_have_one() -> None:
    unet = model("conv_in")
    assert match(["conv_in"], [unet, unet]).layers["conv_in"].module is unet.conv_in


def test_two_names_for_one_layer_are_an_error_unless_the_part_is_said() -> None:
    text_encoder = model("text_model.fc1")
    names = ["lora_te1_text_model_fc1", "lora_te2_text_model_fc1"]
    with pytest.raises(LoraMismatch, match=r"both mean text_model.fc1; say which part of the file with prefix="):
        match(names, [text_encoder])
    for prefix, name in (("text_encoder", names[0]), ("text_encoder_2", names[1]), ("lora_te2_", names[1])):
        matches = match(names, [text_encoder], prefix)
        assert list(matches.layers) == [name]
        assert matches.unmatched == ()


def test_part_is_found_in_every_style() -> None:
    unet = model("proj_in")
    for name in ("unet.proj_in", "lora_unet_proj_in", "base_model.model.unet.proj_in"):
        assert list(match([name, "text_encoder.proj_in"], [unet], "unet").layers) == [name]
    assert list(match(["my.net.proj_in"], [unet], "my.net").layers) == ["my.net.proj_in"]
    assert match(["unet.gone", "vae.proj_in"], [unet], "unet").unmatched == ("unet.gone",)

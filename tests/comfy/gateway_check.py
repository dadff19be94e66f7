"""Runs inside a ComfyUI's process that has no lunashm package: the LoRA nodes' outputs beside those of the stock nodes.

Prints a word for each part that came out the same, to the bit. ``python gateway_check.py MODELS``.
"""

# ruff: noqa: E402 - ComfyUI's arguments are read when it is imported

import json
import sys

models = sys.argv[1]
sys.argv = ["main.py", "--cpu"]
sys.modules["lunashm"] = None  # as where it is not installed
import comfy.options

comfy.options.enable_args_parsing()

import comfy.latent_formats
import comfy.sd
import folder_paths
import nodes
import torch
from comfy_extras import (
    nodes_chroma_radiance,
    nodes_cosmos,
    nodes_flux,
    nodes_hunyuan,
    nodes_lt,
    nodes_mochi,
    nodes_sd3,
)

import comfy_ext
from comfy_ext.nodes import latents

folder_paths.add_model_folder_path("loras", models + "/loras")
luna = comfy_ext.NODE_CLASS_MAPPINGS
gateway = luna["LunaConfigGateway"]()

SIZE = {"width": 200, "height": 136, "batch_size": 3}
ONE_FRAME = {"length": 1}


def latent_of(node, **size):
    made = node.execute(**size).result if hasattr(node, "execute") else node().generate(**size)
    return made[0]


def same_latent(ours, theirs):
    same = ours["samples"].dtype == theirs["samples"].dtype and torch.equal(ours["samples"], theirs["samples"])
    return same and all(ours[key] == theirs[key] for key in theirs if key != "samples")


def latents_are_stocks():
    seen = []
    for format_name, node, ratio, *video in (
        ("SD15", nodes.EmptyLatentImage, 8),
        ("SDXL", nodes.EmptyLatentImage, 8),
        ("SD3", nodes_sd3.EmptySD3LatentImage, 8),
        ("Flux", nodes_sd3.EmptySD3LatentImage, 8),
        ("Flux2", nodes_flux.EmptyFlux2LatentImage, 16),
        ("HunyuanImage21", nodes_hunyuan.EmptyHunyuanImageLatent, 32),
        ("ChromaRadiance", nodes_chroma_radiance.EmptyChromaRadianceLatentImage, 1),
        ("HunyuanVideo", nodes_hunyuan.EmptyHunyuanLatentVideo, 8, ONE_FRAME),
        ("HunyuanVideo15", nodes_hunyuan.EmptyHunyuanVideo15Latent, 16, ONE_FRAME),
        ("LTXV", nodes_lt.EmptyLTXVLatentVideo, 32, ONE_FRAME),
        ("Mochi", nodes_mochi.EmptyMochiLatentVideo, 8, ONE_FRAME),
        ("Cosmos1CV8x8x8", nodes_cosmos.EmptyCosmosLatentVideo, 8, ONE_FRAME),
    ):
        vae = object.__new__(comfy.sd.VAE)  # all that is asked of it; a real one of these has gigabytes
        vae.downscale_ratio = ratio if not video else (None, ratio, ratio)
        ours = latents.empty(getattr(comfy.latent_formats, format_name)(), vae, **SIZE)
        theirs = latent_of(node, **SIZE, **dict(*video))
        assert same_latent(ours, theirs), (format_name, ours["samples"].shape, theirs["samples"].shape)
        if node in (nodes.EmptyLatentImage, nodes_sd3.EmptySD3LatentImage):
            assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
        seen.append(format_name)
    try:
        latents.empty(comfy.latent_formats.StableAudio1(), None, **SIZE)
    except ValueError as exc:
        assert "StableAudio1" in str(exc)
        seen.append("no picture")
    print("latents", len(seen))


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def patches_of(patcher):
    return {
        key: [(strength, getattr(value, "weights", value)) for strength, value, *_ in patches]
        for key, patches in patcher.patches.items()
    }


def outputs_are_the_stock_graphs():
    path = models + "/checkpoints/sd15-tiny.safetensors"
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True)[:3]
    stack = luna["LunaLoRAStack"]().stack(lora_1="b.safetensors", model_strength_1=-0.5, clip_strength_1=0.9)[0]
    prompts = "a cat <lora:a:0.8:0.6>", "blurry"
    made = gateway.configure(model, clip, vae, *prompts, 2, 96, 64, 2, lora_stack=stack, unique_id="1")
    their_model, their_clip = model, clip
    for entry in (("b.safetensors", -0.5, 0.9), ("a.safetensors", 0.8, 0.6)):
        their_model, their_clip = nodes.LoraLoader().load_lora(their_model, their_clip, *entry)
    their_clip = nodes.CLIPSetLastLayer().set_last_layer(their_clip, -2)[0]
    for index, text in ((3, "a cat"), (4, "blurry")):
        assert same(made[index], nodes.CLIPTextEncode().encode(their_clip, text)[0])
    assert not same(made[4], nodes.CLIPTextEncode().encode(clip, "blurry")[0]), "a LoRA must change it"
    assert same(patches_of(made[0]), patches_of(their_model)) and patches_of(made[0])
    assert same(patches_of(made[1].patcher), patches_of(their_clip.patcher)) and patches_of(made[1].patcher)
    assert not model.patches and not clip.patcher.patches, "what came in was changed"
    assert made[2] is vae and same_latent(made[5], nodes.EmptyLatentImage().generate(96, 64, 2)[0])
    metadata = json.loads(made[9])
    assert [lora["model_to"] for lora in metadata["loras"]] == ["local", "local"]
    assert metadata["origins"]["model"].startswith("local: the lunashm package is not installed")
    print("outputs")


def inputs_are_explained():
    for name in ("LunaConfigGateway", "LunaLoRAStack", "LunaLoRAValidator"):
        node = luna[name]
        given = node.INPUT_TYPES()
        for what, (_, options) in (given["required"] | given["optional"]).items():
            assert options["tooltip"], (name, what)
        assert node.DESCRIPTION and name in comfy_ext.NODE_DISPLAY_NAME_MAPPINGS
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    print("explained")


with torch.inference_mode():
    latents_are_stocks()
    outputs_are_the_stock_graphs()
    inputs_are_explained()

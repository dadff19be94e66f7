"""Diffusion checkpoints with random weights that stock ComfyUI loaders accept.

Owns which tensors each architecture has. Names and shapes come from ComfyUI's own classes, built on the meta
device; the values are bench.random_weights'.

    python -m bench.checkpoints sd15-tiny tiny.safetensors --dtype fp16

CLIP-L is always whole: ComfyUI builds all 12 layers whatever the file holds, and leaves uninitialised what it
lacks. So any file with a text encoder has 123 M parameters for it (246 MB in fp16).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.random_weights import DTYPES, Shapes, filled, write
from bench.root import ROOT

MAKE_TIMEOUT_S = 600


class CheckpointError(Exception):
    """A checkpoint could not be made; the message names the architecture and the cause."""


def comfy_root(comfy: str | Path | None = None) -> Path:
    """The ComfyUI checkout: the argument, else $LUNASHM_COMFYUI, else ~/ComfyUI."""
    root = Path(comfy or os.environ.get("LUNASHM_COMFYUI") or "~/ComfyUI").expanduser().resolve()
    if not (root / "comfy" / "sd.py").is_file():
        raise CheckpointError(f"no ComfyUI checkout at {root}; pass it or set LUNASHM_COMFYUI")
    return root


def make(arch: str, out: str | Path, comfy: str | Path | None = None, dtype: str = "fp16", seed: int = 0) -> Path:
    """Write one file in a process of its own (ComfyUI's modules stay out of this one); returns its path."""
    command = [sys.executable, "-m", "bench.checkpoints", arch, str(Path(out).absolute())]
    command += ["--comfy", str(comfy_root(comfy)), "--dtype", dtype, "--seed", str(seed)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=MAKE_TIMEOUT_S)
    except subprocess.TimeoutExpired as exc:
        raise CheckpointError(f"making {arch} at {out} took more than {MAKE_TIMEOUT_S} s") from exc
    if done.returncode:
        tail = done.stderr[-3000:]
        raise CheckpointError(f"making {arch} at {out} failed (exit {done.returncode}):\n{tail}")
    return Path(out)


# --- which tensors: ComfyUI's classes, on the meta device -----------------------------------------


def _shapes(module: torch.nn.Module, prefix: str = "") -> Shapes:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _build(path: str, **config: object) -> torch.nn.Module:
    """Instantiate a class of ComfyUI's by dotted path, without memory for its parameters."""
    module, _, name = path.rpartition(".")
    with torch.device("meta"):
        built: torch.nn.Module = getattr(importlib.import_module(module), name)(**config)
    return built


def _ops() -> object:
    """The layer classes that skip initialisation."""
    return importlib.import_module("comfy.ops").disable_weight_init


def _unet(mult: list[int], blocks: int, depth: list[int], out_depth: list[int]) -> Shapes:
    unet = _build(
        "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel", image_size=32, in_channels=4,
        out_channels=4, model_channels=320, num_res_blocks=[blocks] * len(mult), channel_mult=mult,
        transformer_depth=depth, transformer_depth_output=out_depth, transformer_depth_middle=1,
        context_dim=768, num_heads=8, legacy=False, use_spatial_transformer=True, device="meta",
        operations=_ops(),
    )  # fmt: skip
    return _shapes(unet, "model.diffusion_model.")


def _clip(config: str) -> torch.nn.Module:
    """A text encoder as one of the configurations that lie beside ComfyUI's modules describes it."""
    beside = Path(str(importlib.import_module("comfy.sd1_clip").__file__)).with_name(config)
    return _build(
        "comfy.clip_model.CLIPTextModel", config_dict=json.loads(beside.read_text()), dtype=None, device="meta",
        operations=_ops(),
    )  # fmt: skip


def _clip_l(prefix: str, projection: bool = True) -> Shapes:
    shapes = _shapes(_clip("sd1_clip_config.json"), prefix)
    if not projection:
        del shapes[prefix + "text_projection.weight"]
    return shapes


def _kl_vae(prefix: str) -> Shapes:
    dd: dict[str, Any] = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
    dd |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    vae = _build("comfy.ldm.models.autoencoder.AutoencoderKL", ddconfig=dd, embed_dim=4)
    return _shapes(vae, prefix)


def _taesd(prefix: str, channels: int) -> Shapes:
    return _shapes(_build("comfy.taesd.taesd.TAESD", latent_channels=channels), prefix)


def sd15() -> Shapes:
    """Full SD1.5: the 1131 tensors of the original LDM file (it has position_ids, and no text_projection)."""
    clip = "cond_stage_model.transformer."
    unet = _unet([1, 2, 4, 4], 2, [1, 1, 1, 1, 1, 1, 0, 0], [1] * 9 + [0] * 3)
    ids: Shapes = {clip + "text_model.embeddings.position_ids": (1, 77)}
    return ids | unet | _kl_vae("first_stage_model.") | _clip_l(clip, projection=False)  # 8-byte entry first


def sd15_tiny() -> Shapes:
    """SD1.5 of one level and one residual block (detection asks for 320 channels and context 768)."""
    unet = _unet([1], 1, [1], [1, 1])
    return unet | _taesd("first_stage_model.", 4) | _clip_l("cond_stage_model.transformer.", projection=False)


def sdxl() -> Shapes:
    """SDXL base: the 2515 tensors of the published file, its second text encoder under open_clip's names.

    There is no tiny one: detection wants these depths, and ComfyUI builds both text encoders whole (1.6 GB in fp16).
    """
    unet = _build(
        "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel", image_size=32, in_channels=4, out_channels=4,
        model_channels=320, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10, context_dim=2048,
        num_head_channels=64, num_classes="sequential", adm_in_channels=2816, use_linear_in_transformer=True,
        legacy=False, use_spatial_transformer=True, device="meta", operations=_ops(),
    )  # fmt: skip
    clip_l = "conditioner.embedders.0.transformer."
    ids: Shapes = {clip_l + "text_model.embeddings.position_ids": (1, 77)}
    return (
        ids | _shapes(unet, "model.diffusion_model.") | _kl_vae("first_stage_model.")
        | _clip_l(clip_l, projection=False) | _open_clip_g("conditioner.embedders.1.model")
    )  # fmt: skip


def _open_clip_g(prefix: str) -> Shapes:
    """ComfyUI's own conversion to the names it saves, which are those of published files."""
    convert = importlib.import_module("comfy.diffusers_convert").convert_text_enc_state_dict_v20
    state = {f"{prefix}.transformer.{name}": t for name, t in _clip("clip_config_bigg.json").state_dict().items()}
    scale: Shapes = {f"{prefix}.logit_scale": ()}
    return {name: tuple(tensor.shape) for name, tensor in convert(state, prefix).items()} | scale


def sd3_tiny() -> Shapes:
    """SD3 of depth 2, so width 128; positions for latents up to 32x32 patches (512 px)."""
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    mmdit = _build(
        "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", input_size=None,
        in_channels=16, out_channels=16, depth=2, adm_in_channels=2048, num_patches=32 * 32,
        pos_embed_max_size=32, context_embedder_config=embedder, device="meta", operations=_ops(),
    )  # fmt: skip
    shapes = _shapes(mmdit, "model.diffusion_model.") | _taesd("first_stage_model.", 16)
    return shapes | _clip_l("text_encoders.clip_l.transformer.")


def _flux(heads: int, single_blocks: int) -> Shapes:
    """Flux of 128 wide heads and one double block; context 768, so that CLIP-L alone can condition it.

    ComfyUI 0.8 cannot load it: there a Flux has 24 heads whatever the file says.
    """
    flux = _build(
        "comfy.ldm.flux.model.Flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=768,
        hidden_size=128 * heads, mlp_ratio=4.0, num_heads=heads, depth=1, depth_single_blocks=single_blocks,
        axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, device="meta",
        operations=_ops(), txt_ids_dims=[],
    )  # fmt: skip
    # Published files say `.scale`; ComfyUI 0.28 calls the parameter `.weight` and maps the file's name.
    return {re.sub(r"_norm\.weight$", "_norm.scale", name): shape for name, shape in _shapes(flux).items()}


def flux_tiny() -> Shapes:
    """Flux of one head, one double and one single block."""
    return _flux(heads=1, single_blocks=1)


def flux_1536() -> Shapes:
    """A DiT of realistic width and little depth: 1536 wide, one double and two single blocks, 0.17 G parameters."""
    return _flux(heads=12, single_blocks=2)


ARCHS: dict[str, Callable[[], Shapes]] = {
    "sd15": sd15,
    "sd15-tiny": sd15_tiny,
    "sdxl": sdxl,
    "sd3-tiny": sd3_tiny,
    "flux-tiny": flux_tiny,
    "flux-1536": flux_1536,
    "clip-l": lambda: _clip_l(""),
    "vae-tiny": lambda: _taesd("", 16),
}
LATENT_SCALE = {"sd15-tiny": (0.18215, 0.0), "sd3-tiny": (1.5305, 0.0609), "vae-tiny": (0.3611, 0.1159)}


def main(argv: list[str] | None = None) -> None:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=about)
    parser.add_argument("arch", choices=list(ARCHS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--comfy", help="ComfyUI checkout (default: $LUNASHM_COMFYUI, else ~/ComfyUI)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sys.path.insert(0, str(comfy_root(args.comfy)))
    importlib.import_module("comfy.cli_args").args.cpu = True  # before anything asks for a device
    shapes = ARCHS[args.arch]()
    latent = LATENT_SCALE.get(args.arch, (1.0, 0.0))
    tensors = filled(shapes, args.seed, latent, DTYPES[args.dtype])
    metadata = {"format": "pt", "about": f"random weights: {args.arch}, seed {args.seed}"}
    size = write(args.out, shapes, DTYPES[args.dtype], tensors, metadata)
    print(f"{args.out}: {len(shapes)} tensors, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

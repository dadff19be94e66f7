"""Module trees with the names and shapes of the tiny checkpoints, for peft and lycoris-lora to put adapters on.

Diffusers' and transformers' own classes where a trainer would have them; for trainers that work on a model's native
names, plain layers named as the checkpoint names them. The values are not the checkpoint's: adapters are random anyway.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open


def unet() -> torch.nn.Module:
    """Diffusers' UNet of sd15-tiny: one level, one residual block."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(320,), layers_per_block=1, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip


def mid_block() -> torch.nn.Module:
    """The UNet with its middle alone: convolutions, attention and norms, in few bytes."""
    model = unet()
    del model.down_blocks, model.up_blocks
    del model.conv_out  # four rows: OFT's blocks of one number turn nothing
    del model.time_embedding  # lycoris-lora 4.1.3 takes its layers twice, by class and by name, and refuses
    return model


def clip() -> torch.nn.Module:
    """Transformers' CLIP-L of two layers. The class with the projection: it alone still says ``text_model.``."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def flux() -> torch.nn.Module:
    """Diffusers' transformer of flux-tiny: q, k and v apart, which the checkpoint has fused."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=768, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip


def sd3() -> torch.nn.Module:
    """Diffusers' transformer of sd3-tiny."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=4096, caption_projection_dim=128, pooled_projection_dim=2048,
        pos_embed_max_size=32,
    )  # fmt: skip


def native(base: Path, prefix: str, parts: tuple[str, ...]) -> torch.nn.Module:
    """Linear layers by the checkpoint's own names; ``parts``: those whose name has one of these in it."""
    root = torch.nn.Module()
    shapes = shapes_of(base, prefix)
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2 and any(part in name for part in parts):
            path = name.removesuffix(".weight")
            _put(root, path, torch.nn.Linear(shape[1], shape[0], bias=f"{path}.bias" in shapes))
    return root


def shapes_of(base: Path, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Name, without ``prefix``, and shape of every tensor of a checkpoint below it."""
    with safe_open(base, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
        return {name.removeprefix(prefix): tuple(file.get_slice(name).get_shape()) for name in names}


def _put(root: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, torch.nn.Module())
        root = getattr(root, name)
    root.add_module(leaf, layer)


def train(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Stands in for training: what starts at zero gets values, magnitudes and scales are changed."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if any(word in name for word in ("dora_scale", "magnitude", "rescale")):
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif not parameter.any():
                parameter.normal_(0, 0.1)

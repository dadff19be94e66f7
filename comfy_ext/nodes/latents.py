"""An empty latent for a MODEL: what its family's own Empty...Latent node makes, of one frame where it is video."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

_USUAL_RATIO = 8


def empty(latent_format: Any, vae: Any, width: int, height: int, batch_size: int) -> dict[str, Any]:
    """``latent_format``: the MODEL's. ``width`` and ``height`` in pixels.

    ``samples``: (batch, channels, height, width), or (batch, channels, 1, height, width) for video.
    """
    if latent_format.latent_dimensions == 1:
        raise ValueError(
            f"this model's latents ({type(latent_format).__name__}) have no width and height; "
            "it is not for pictures: use CLIPTextEncode and the empty latent node made for it"
        )
    told = getattr(latent_format, "spacial_downscale_ratio", None)  # ComfyUI 0.8: the format does not say
    ratio = told or (vae.spacial_compression_encode() if vae is not None else _USUAL_RATIO)
    frames = [1] if latent_format.latent_dimensions == 3 else []
    shape = [batch_size, latent_format.latent_channels, *frames, max(1, height // ratio), max(1, width // ratio)]
    latent = {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device(), **_dtype())}
    # ComfyUI 0.28: an empty latent says what it was made for, so that a sampler can fit it to another model
    return latent if told is None else latent | {"downscale_ratio_spacial": ratio}


def _dtype() -> dict[str, torch.dtype]:
    """ComfyUI 0.8 has no choice of it."""
    chosen = getattr(comfy.model_management, "intermediate_dtype", None)
    return {"dtype": chosen()} if chosen is not None else {}

"""What the loader nodes have in common: their widgets and outputs."""

from __future__ import annotations

from typing import Any

from . import families, files, precision
from .loading import MODES

LOADED_TYPES = ("MODEL", "CLIP", "VAE", "STRING", "STRING")
LOADED_NAMES = ("model", "clip", "vae", "model_name", "status")
LOADED_TOOLTIPS = (
    "The diffusion model, for samplers and LoRA loaders.",
    "The text encoders, for encoding prompts.",
    "The VAE, for decoding latents to images and back.",
    "The model's name as chosen.",
    "A line each for MODEL, CLIP and VAE: from the host or local, how many bytes, and why.",
)


def model() -> dict[str, Any]:
    """Which model, and how."""
    return {
        "model_source": _choice(
            list(files.SOURCES), files.SOURCES[0],
            "The folder of the model: checkpoints bring text encoders and VAE along, the others need them chosen "
            "below. unet is ComfyUI's older name for diffusion_models.",
        ),
        "model_name": (files.models(), {"tooltip": "The model, from the folder that model_source names."}),
        "model_type": _choice(
            families.choices(), families.AUTO,
            "What kind of model it is. auto takes what ComfyUI detects; anything else is checked against that, and "
            "says which text encoders are needed before the model is read.",
        ),
        "precision": _choice(
            precision.CHOICES, precision.AUTO,
            "Dtype of the diffusion model's weights. auto: what ComfyUI chooses, so that stock loaders share the same "
            "copy. as stored: as in the file. Others are converted once, in the host, for all who ask.",
        ),
        "daemon_mode": _choice(
            MODES, MODES[0],
            "auto: from the host, and locally with the reason where that cannot be (or as the mode setting says). "
            "force_daemon: from the host or an error. force_local: without the host.",
        ),
    }  # fmt: skip


def parts() -> dict[str, Any]:
    """Text encoders and VAE beside the model."""
    encoders = files.text_encoders()
    clips = {
        f"clip_{number}": _choice(
            encoders, files.NONE,
            f"Text encoder {number}. none: the checkpoint's own. A chosen one replaces all of the checkpoint's.",
        )
        for number in range(1, 5)
    }  # fmt: skip
    return clips | {"vae_name": _choice(files.vaes(), files.NONE, "The VAE. none: the checkpoint's own.")}


def _choice(options: list[str], default: str, tooltip: str) -> tuple[list[str], dict[str, str]]:
    return options, {"default": default, "tooltip": tooltip}

"""Names in ComfyUI's model folders: what a node may choose from, and which file a name means."""

from __future__ import annotations

from collections.abc import Sequence

import folder_paths

NONE = "none"
SOURCES = ("checkpoints", "diffusion_models", "unet")
"""``unet`` is what ComfyUI called ``diffusion_models`` before: the two are one list there."""


def models() -> list[str]:
    """Of all sources: which of them has the name is seen when the node runs."""
    return sorted({name for source in SOURCES for name in folder_paths.get_filename_list(source)})


def text_encoders() -> list[str]:
    return [NONE, *folder_paths.get_filename_list("text_encoders")]


def vaes() -> list[str]:
    """As stock's VAELoader lists them, with what it makes without a file."""
    import nodes  # noqa: PLC0415 - ComfyUI's; while it starts, custom nodes are imported from there

    return [NONE, *nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0]]


def model_path(source: str, name: str) -> str:
    """Raises FileNotFoundError that says where the name is instead."""
    if name in folder_paths.get_filename_list(source):
        return str(folder_paths.get_full_path_or_raise(source, name))
    elsewhere = [other for other in SOURCES if name in folder_paths.get_filename_list(other)]
    advice = f"it is in {elsewhere[0]}: set model_source to that" if elsewhere else "refresh ComfyUI's list of models"
    raise FileNotFoundError(f"{name} is not in {source}; {advice}")


def encoder_paths(names: Sequence[str]) -> list[str]:
    return [str(folder_paths.get_full_path_or_raise("text_encoders", name)) for name in names]

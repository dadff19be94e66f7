"""Luna Model Router: one node for a model with its text encoders and VAE, from the host where that can be."""

from __future__ import annotations

from typing import Any, ClassVar

from . import families, inputs
from .loading import Loaded, Request, check_encoders, load_clip, load_model, load_vae, strictly


class LunaModelRouter:
    """A checkpoint, or a diffusion model with the text encoders and the VAE that go with it."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Loads a model with its text encoders and VAE. Each comes from the lunashm host where it can, so that all "
        "ComfyUIs on this machine share one copy of the weights; status says for each where it came from and why."
    )
    FUNCTION = "load"
    RETURN_TYPES = inputs.LOADED_TYPES
    RETURN_NAMES = inputs.LOADED_NAMES
    OUTPUT_TOOLTIPS = inputs.LOADED_TOOLTIPS
    SEARCH_ALIASES: ClassVar = ["load checkpoint", "load diffusion model", "lunashm", "daemon"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": inputs.model(), "optional": inputs.parts()}

    def load(self, **given: Any) -> tuple[Any, Any, Any, str, str]:
        request = Request.of(given)
        loaded = Loaded(request, "LunaModelRouter")
        with strictly(loaded):
            _load(request, loaded)
        return loaded.model, loaded.clip, loaded.vae, request.name, loaded.status


def _load(request: Request, loaded: Loaded) -> None:
    if request.source != "checkpoints":
        family = families.named(request.family)
        if family is not None:
            check_encoders(request, family)  # before anything large is read
    load_model(request, loaded, with_clip=not request.encoders, with_vae=not request.has_vae)
    if loaded.clip is None:
        load_clip(request, loaded)
    if loaded.vae is None:
        load_vae(request, loaded)

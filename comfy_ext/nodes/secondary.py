"""Luna Secondary Model Loader: a second model, with the text encoders and VAE of a first one where they fit."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import comfy.sd

from . import families, inputs
from .loading import Loaded, Request, load_clip, load_model, load_rest, load_vae, strictly
from .origin import origin_of

log = logging.getLogger("lunashm.comfy")


class LunaSecondaryModelLoader:
    """A refiner, or another model of the same kind: only what differs is loaded."""

    CATEGORY = "Luna"
    DESCRIPTION = (
        "Loads a second model (a refiner, another finetune). Text encoders and VAE of the first are used again where "
        "they are of the kind the second model needs; what does not fit is loaded as the Luna Model Router does it."
    )
    FUNCTION = "load"
    RETURN_TYPES = inputs.LOADED_TYPES
    RETURN_NAMES = inputs.LOADED_NAMES
    OUTPUT_TOOLTIPS = inputs.LOADED_TOOLTIPS
    SEARCH_ALIASES: ClassVar = ["second model", "refiner", "lunashm"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        first = {"first_model": ("MODEL", {"tooltip": "The first model: its VAE fits where the latents are the same."})}
        reusable = {
            "clip": ("CLIP", {"tooltip": "The first model's text encoders. Not connected: the second brings its own."}),
            "vae": ("VAE", {"tooltip": "The first model's VAE. Not connected: the second brings its own."}),
        }
        return {"required": first | inputs.model(), "optional": reusable | inputs.parts()}

    def load(self, first_model: Any, clip: Any = None, vae: Any = None, **given: Any) -> tuple[Any, Any, Any, str, str]:
        request = Request.of(given)
        loaded = Loaded(request, "LunaSecondaryModelLoader")
        with strictly(loaded):
            load_model(request, loaded, with_clip=False, with_vae=False)
            _reuse(loaded, first_model, clip, vae)
            if request.source == "checkpoints":
                with_clip = loaded.clip is None and not request.encoders
                load_rest(request, loaded, with_clip=with_clip, with_vae=loaded.vae is None and not request.has_vae)
            if loaded.clip is None:
                load_clip(request, loaded)
            if loaded.vae is None:
                load_vae(request, loaded)
        return loaded.model, loaded.clip, loaded.vae, request.name, loaded.status


def _reuse(loaded: Loaded, first_model: Any, clip: Any, vae: Any) -> None:
    """Take over what fits. What is chosen by name in the node itself counts before what is connected."""
    request = loaded.request
    if clip is not None and not request.encoders:
        if _encodes_for(clip, loaded.model, first_model):
            loaded.clip = clip
            loaded.reused("CLIP", origin_of(clip))
        else:
            _unfit(loaded, "CLIP", type(clip.tokenizer).__name__)
    if vae is not None and not request.has_vae:
        if type(_latents(first_model)) is type(_latents(loaded.model)):
            loaded.vae = vae
            loaded.reused("VAE", origin_of(vae))
        else:
            _unfit(loaded, "VAE", type(_latents(first_model)).__name__)


def _unfit(loaded: Loaded, what: str, kind: str) -> None:
    name = loaded.request.name
    log.info("[%s] the first model's %s (%s) does not fit %s", loaded.node, what, kind, name)


def _encodes_for(clip: comfy.sd.CLIP, model: Any, first_model: Any) -> bool:
    """Whether this CLIP is of the kind that ComfyUI would make for ``model``; else whether the families are one."""
    try:
        target = model.model.model_config.clip_target(state_dict={})
    except (AttributeError, KeyError, TypeError):  # some kinds cannot say without their own weights
        target = None
    if target is not None and type(clip.tokenizer) is target.tokenizer:
        return True
    family = families.family_of(model)
    return target is None and family is not None and family is families.family_of(first_model)


def _latents(model: Any) -> Any:
    return model.get_model_object("latent_format")

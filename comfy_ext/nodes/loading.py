"""A model, its text encoders and its VAE, loaded by ComfyUI's own loaders, and where each came from.

Whether something comes from the host is decided where stock loaders are hooked; here it is only asked for and told.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.sd
import folder_paths

from .. import asking
from . import families, files, precision
from .origin import Origin, origin_of

log = logging.getLogger("lunashm.comfy")

MODES = ["auto", "force_daemon", "force_local"]


class LoadRefused(RuntimeError):
    """What was asked for cannot be loaded as asked; the message says what to choose instead."""


@dataclass(frozen=True)
class Request:
    """What a loader node is asked for, as its inputs say it. ``encoders``: names without ``none``."""

    source: str
    name: str
    family: str
    precision: str
    mode: str
    encoders: tuple[str, ...] = ()
    vae: str = files.NONE

    @property
    def has_vae(self) -> bool:
        return self.vae != files.NONE

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Request:
        """From the inputs of a node that has those of ``inputs.py``."""
        clips = [inputs.get(f"clip_{number}", files.NONE) for number in range(1, 5)]
        chosen = tuple(clip for clip in clips if clip != files.NONE)
        return cls(
            inputs["model_source"], inputs["model_name"], inputs["model_type"], inputs["precision"],
            inputs["daemon_mode"], chosen, inputs.get("vae_name", files.NONE),
        )  # fmt: skip


@dataclass
class Loaded:
    """``origins``: MODEL, CLIP, VAE -> where from, in words; ``node`` is who says so in the log."""

    request: Request
    node: str
    model: Any = None
    clip: Any = None
    vae: Any = None
    origins: dict[str, str] = field(default_factory=dict)
    local: list[str] = field(default_factory=list)

    def tell(self, what: str, name: str, origin: Origin) -> None:
        mode = self.request.mode
        self.origins[what] = f"{name}: {origin}"
        if not origin.shared:
            self.local.append(what)
        chosen = not origin.shared and mode == "force_local"
        sign = "✓ " if origin.shared else "" if chosen else "⚠ "
        level = logging.INFO if origin.shared or chosen else logging.WARNING
        log.log(level, "[%s] %s%s %s: %s; daemon_mode %s", self.node, sign, what, name, origin, mode)

    def reused(self, what: str, origin: Origin) -> None:
        """``what`` was there already."""
        self.origins[what] = f"the first model's, {origin}"
        log.info("[%s] ✓ %s: the first model's is used, %s", self.node, what, origin)

    @property
    def status(self) -> str:
        """A line each for MODEL, CLIP and VAE, then the mode."""
        lines = [f"{what} {self.origins[what]}" for what in ("MODEL", "CLIP", "VAE") if what in self.origins]
        return "\n".join([*lines, f"daemon_mode {self.request.mode}"])


def load_model(request: Request, loaded: Loaded, *, with_clip: bool, with_vae: bool) -> None:
    """The diffusion model and, where a checkpoint has them and they are wanted, its encoders and VAE.

    Raises LoadRefused for a model of another type than was said.
    """
    if request.source == "checkpoints":
        _load_checkpoint(request, loaded, output_model=True, output_clip=with_clip, output_vae=with_vae)
    else:
        path = files.model_path(request.source, request.name)
        with asking.Asking(request.mode) as asked:
            loaded.model = comfy.sd.load_diffusion_model(path, model_options=_options(request, path))
        if loaded.model is not None:
            loaded.tell("MODEL", request.name, origin_of(loaded.model, asked.reasons))
    _check_family(request, loaded.model)


def load_rest(request: Request, loaded: Loaded, *, with_clip: bool, with_vae: bool) -> None:
    """What a checkpoint has beside its diffusion model, where wanted."""
    if with_clip or with_vae:
        _load_checkpoint(request, loaded, output_model=False, output_clip=with_clip, output_vae=with_vae)


def _load_checkpoint(request: Request, loaded: Loaded, **wanted: bool) -> None:
    path = files.model_path(request.source, request.name)
    with asking.Asking(request.mode) as asked:
        parts = comfy.sd.load_checkpoint_guess_config(
            path, embedding_directory=_embeddings(), model_options=_options(request, path), **wanted
        )
    model, clip, vae = parts[:3]
    if getattr(vae, "first_stage_model", None) is None:
        vae = None  # ComfyUI's stand-in for a checkpoint without one
    for what, holder in (("MODEL", model), ("CLIP", clip), ("VAE", vae)):
        if holder is not None:
            setattr(loaded, what.lower(), holder)
            loaded.tell(what, request.name, origin_of(holder, asked.reasons))


def _options(request: Request, path: str) -> dict[str, Any]:
    return precision.model_options(request.precision, path)


def load_clip(request: Request, loaded: Loaded) -> None:
    """The chosen text encoders. Raises LoadRefused, listing what the type needs."""
    family = families.named(request.family) or families.family_of(loaded.model)
    check_encoders(request, family)
    kind = family.clip_type if family is not None else "STABLE_DIFFUSION"
    clip_type = getattr(comfy.sd.CLIPType, kind, comfy.sd.CLIPType.STABLE_DIFFUSION)
    with asking.Asking(request.mode) as asked:
        loaded.clip = comfy.sd.load_clip(
            ckpt_paths=files.encoder_paths(request.encoders), embedding_directory=_embeddings(),
            clip_type=clip_type,
        )  # fmt: skip
    loaded.tell("CLIP", " + ".join(request.encoders), origin_of(loaded.clip, asked.reasons))


def load_vae(request: Request, loaded: Loaded) -> None:
    """The chosen VAE. Raises LoadRefused where none is chosen and the model brought none."""
    if not request.has_vae:
        raise LoadRefused(f"{request.name} brings no VAE: choose one in vae_name")
    import nodes  # noqa: PLC0415 - ComfyUI's

    with asking.Asking(request.mode) as asked:
        (loaded.vae,) = nodes.VAELoader().load_vae(request.vae)
    loaded.tell("VAE", request.vae, origin_of(loaded.vae, asked.reasons))


def check_encoders(request: Request, family: families.Family | None) -> None:
    """Raises LoadRefused where too few text encoders are chosen, or more than the type has."""
    chosen = len(request.encoders)
    if family is None:
        if not chosen:
            raise LoadRefused(f"{request.name} brings no text encoder: choose the ones it needs in clip_1 to clip_4")
        return
    if not family.fewest <= chosen <= len(family.encoders):
        have = f"chosen: {', '.join(request.encoders)}" if chosen else "it brings none, and none is chosen"
        advice = "choose them in clip_1 to clip_4"
        raise LoadRefused(f"{family.needs()} as text encoders of {request.name}; {have}: {advice}")


def _check_family(request: Request, model: Any) -> None:
    if model is None:
        raise LoadRefused(f"{request.name} is no model that ComfyUI knows")
    wanted, found = families.named(request.family), families.family_of(model)
    if wanted is not None and found is not None and wanted is not found:
        raise LoadRefused(f"{request.name} is {found.name}, not {wanted.name}: set model_type to {found.name}, or auto")


def _embeddings() -> list[str]:
    return list(folder_paths.get_folder_paths("embeddings"))


@contextlib.contextmanager
def strictly(loaded: Loaded) -> Iterator[None]:
    """Around a whole node: with ``force_daemon`` all of it comes from the host, or LoadRefused is raised."""
    if loaded.request.mode != "force_daemon":
        yield
        return
    refused = f"[{loaded.node}] daemon_mode is 'force_daemon', so nothing is loaded locally: "
    if asking.unavailable:
        raise LoadRefused(refused + asking.unavailable)
    from lunashm.errors import LunashmError  # noqa: PLC0415 - may be missing

    from ..trace import UntraceableError  # noqa: PLC0415 - needs lunashm

    try:
        yield
    except (LunashmError, UntraceableError) as exc:
        raise LoadRefused(f"{refused}{exc}") from exc
    if loaded.local:
        raise LoadRefused(refused + "; ".join(f"{what} {loaded.origins[what]}" for what in loaded.local))

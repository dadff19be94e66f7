"""Where this ComfyUI computes, which hosts can lend it weights there, and how its loaders are kept off the GPU.

A model's *home* is where the host's bytes are. Where that is the device that computes, nothing is ever moved. Where it
is RAM and a GPU computes (the RAM tier), the GPU has copies, as in any ComfyUI, and offloading goes back to the home.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from lunashm import cuda_views, settings
from lunashm.endpoints import endpoint_of
from lunashm.errors import LunashmError, WrongDevice
from lunashm.memory import CPU
from lunashm.paths import Endpoint, find_host
from lunashm.protocol import HostInfo

from . import trace

log = logging.getLogger("lunashm.comfy")

CPU_DEVICE = torch.device(CPU)

_BUILD_ON = (
    "unet_inital_load_device",
    "unet_offload_device",
    "text_encoder_initial_device",
    "text_encoder_offload_device",
    "vae_offload_device",
)
"""ComfyUI's functions that say where a model is built and kept. With ``--highvram`` that is the GPU, and each loader
would take memory there for the whole model, only to have the host's put in its place."""


def install() -> None:
    """While a load is traced, models are built in RAM, where nothing is committed before it is written to."""
    module = comfy.model_management
    for name in _BUILD_ON:
        setattr(module, name, _in_ram(getattr(module, name)))
    module.text_encoder_device = _where_the_weights_are(module.text_encoder_device)


def _in_ram(stock: Callable[..., torch.device]) -> Callable[..., torch.device]:
    @functools.wraps(stock)
    def device(*args: Any, **kwargs: Any) -> torch.device:
        return stock(*args, **kwargs) if trace.active() is None else CPU_DEVICE

    return device


def _where_the_weights_are(stock: Callable[..., torch.device]) -> Callable[..., torch.device]:
    """``--lowvram`` has text encoders run on the CPU to save VRAM. Weights that are in VRAM anyway save more there."""

    @functools.wraps(stock)
    def text_encoder_device(*args: Any, **kwargs: Any) -> torch.device:
        device, active = stock(*args, **kwargs), trace.active()
        if active is None or device.type != CPU or active.home.type == CPU:
            return device
        log.info("[lunashm] text encoders run on %s, where their weights are, not on the CPU", active.home)
        return active.home

    return text_encoder_device


def compute_device() -> torch.device:
    device: torch.device = comfy.model_management.get_torch_device()
    return device


def endpoint() -> Endpoint:
    """The host to ask: the one that is configured, else that of the GPU that computes, else that of the CPU's memory.

    Where nobody is there, the best one that could be. Raises SettingsError.
    """
    found = candidates()
    return next((one for one in found if find_host(one) is not None), found[0])


def candidates() -> list[Endpoint]:
    """Hosts that could lend to this ComfyUI, best first. Raises SettingsError."""
    chosen = settings.load()
    if chosen.endpoint or chosen.device != settings.AUTO:
        return [endpoint_of(chosen)]
    return [Endpoint.for_device(uuid) for uuid in dict.fromkeys((_own_uuid(compute_device()), CPU))]


@functools.cache
def _own_uuid(device: torch.device) -> str:
    """``cpu`` too, with the reason in the log, for a device whose memory no host can lend."""
    try:
        return cuda_views.device_uuid(device)
    except LunashmError as exc:
        log.warning("[lunashm] memory of %s cannot be shared, RAM can: %s", device, exc.message)
        return CPU


def home_of(host: HostInfo) -> torch.device:
    """Where the weights of ``host`` are, as torch calls it here. Raises WrongDevice, saying both names."""
    if host.device == CPU:
        return CPU_DEVICE
    ours = compute_device()
    if host.device != _own_uuid(ours):
        raise WrongDevice(
            f"the host at {host.endpoint} lends memory of {host.device_name} ({host.device}), and this ComfyUI runs on "
            f"{ours} ({_own_uuid(ours)}); start a host for that, or one for RAM: lunashm serve --device cpu"
        )
    return ours


def can_use(load_device: torch.device, home: torch.device) -> bool:
    """Whether a model that runs on ``load_device`` can do with weights at ``home``: the CPU computes with no VRAM."""
    return home.type == CPU or load_device.type != CPU

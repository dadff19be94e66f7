"""Which endpoint the settings mean: device names become a GPU's UUID, which is what its endpoint is called."""

from __future__ import annotations

from lunashm.memory import CPU
from lunashm.paths import Endpoint
from lunashm.settings import Settings


def canonical(device: str) -> str:
    """``cpu``, or the UUID of the GPU that ``cuda``, ``cuda:1`` or ``GPU-...`` means in this process.

    CUDA_VISIBLE_DEVICES decides which GPU an ordinal is, as everywhere. Raises SettingsError for a device that there
    is not, listing those that there are.
    """
    if device == CPU:
        return CPU
    from lunashm.memory import cuda  # noqa: PLC0415 - asks the driver, which a machine without a GPU does not have

    return cuda.resolve(device)


def describe(device: str) -> str:
    """A canonical device as people call it: ``cpu``, or ``cuda:0, NVIDIA H100 80GB HBM3``."""
    if device == CPU:
        return CPU
    from lunashm.memory import cuda  # noqa: PLC0415

    return cuda.describe(device)


def endpoint_of(chosen: Settings) -> Endpoint:
    """The endpoint that is configured, or the device's own. Raises SettingsError."""
    return Endpoint.parse(chosen.endpoint) if chosen.endpoint else Endpoint.for_device(canonical(chosen.device))

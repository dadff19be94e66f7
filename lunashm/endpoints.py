"""Which endpoint the settings mean: that of a device is called after its UUID, whatever ordinal it has here."""

from __future__ import annotations

from lunashm.memory import cuda
from lunashm.paths import Endpoint
from lunashm.settings import Settings


def endpoint_of(chosen: Settings) -> Endpoint:
    """The endpoint that is configured, or the device's own. Raises SettingsError."""
    return Endpoint.parse(chosen.endpoint) if chosen.endpoint else Endpoint.for_device(cuda.resolve(chosen.device))

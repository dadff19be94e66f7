"""Low-rank updates of layers whose weights nobody may write. Knows torch modules, neither files nor ComfyUI."""

from lunashm.client.lowrank.injection import Injection, Plain, inject
from lunashm.client.lowrank.update import UnsupportedLayer, Update

__all__ = ["Injection", "Plain", "UnsupportedLayer", "Update", "inject"]

"""The Luna nodes: loading through the host with the reason shown, LoRAs from prompts and stacks, the host's state.

A file a node, and beside them what they have in common. They work with plain ComfyUI models, too; lunashm is imported
only where a node asks the host.
"""

from .host_status import LunaHostStatus
from .router import LunaModelRouter
from .secondary import LunaSecondaryModelLoader

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LunaModelRouter": LunaModelRouter,
    "LunaSecondaryModelLoader": LunaSecondaryModelLoader,
    "LunaHostStatus": LunaHostStatus,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "LunaModelRouter": "Luna Model Router",
    "LunaSecondaryModelLoader": "Luna Secondary Model Loader",
    "LunaHostStatus": "Luna Host Status",
}

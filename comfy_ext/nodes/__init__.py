"""The Luna nodes: loading through the host with the reason shown, LoRAs from prompts and stacks, the host's state.

A file a node, and beside them what they have in common. They work with plain ComfyUI models, too; lunashm is imported
only where a node asks the host.
"""

NODE_CLASS_MAPPINGS: dict[str, type] = {}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

try:
    import folder_paths  # noqa: F401
except ImportError:
    pass  # outside ComfyUI: what knows nothing of it can be imported by itself
else:
    from .gateway import LunaConfigGateway
    from .host_status import LunaHostStatus
    from .lora_stack import LunaLoRAStack
    from .router import LunaModelRouter
    from .secondary import LunaSecondaryModelLoader
    from .validator import LunaLoRAValidator

    NODE_CLASS_MAPPINGS |= {
        "LunaModelRouter": LunaModelRouter,
        "LunaConfigGateway": LunaConfigGateway,
        "LunaLoRAStack": LunaLoRAStack,
        "LunaSecondaryModelLoader": LunaSecondaryModelLoader,
        "LunaHostStatus": LunaHostStatus,
        "LunaLoRAValidator": LunaLoRAValidator,
    }
    NODE_DISPLAY_NAME_MAPPINGS |= {
        "LunaModelRouter": "Luna Model Router",
        "LunaConfigGateway": "Luna Config Gateway",
        "LunaLoRAStack": "Luna LoRA Stack",
        "LunaSecondaryModelLoader": "Luna Secondary Model Loader",
        "LunaHostStatus": "Luna Host Status",
        "LunaLoRAValidator": "Luna LoRA Validator",
    }

"""The Luna nodes: loading through the host with the reason shown, LoRAs from prompts and stacks, the host's state.

A file a node, and beside them what they have in common. They work with plain ComfyUI models, too; lunashm is imported
only where a node asks the host.
"""

NODE_CLASS_MAPPINGS: dict[str, type] = {}

NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

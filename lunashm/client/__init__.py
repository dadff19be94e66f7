"""The client library: attach to a model that a host on this machine has loaded. Needs no ComfyUI (I10).

    import lunashm.client

    with lunashm.client.attach("/models/sd15.safetensors") as model:
        module.load_state_dict(model.state_dict(), assign=True)
"""

from lunashm.client.attachment import Attachment, attach, rules_of
from lunashm.client.session import Session, session_for

__all__ = ["Attachment", "Session", "attach", "rules_of", "session_for"]

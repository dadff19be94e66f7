"""lunashm for ComfyUI: stock loaders attach to a host by themselves. Knows the client library, never the host.

Reads: trace.py sees what a stock loader does with a file, binding.py puts the host's bytes in its place, patcher.py
keeps ComfyUI from moving or writing them, attach.py hooks the loaders. The nodes are for people: they work without a
host, and without the lunashm package.
"""

import logging

from . import asking

__version__ = "0.1.0"

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = "./web"

_log = logging.getLogger("lunashm.comfy")


def _start() -> None:
    try:
        import lunashm  # noqa: PLC0415 - may be missing
    except ImportError:
        _do_without(
            "the lunashm package is not installed in this Python, so models are loaded locally; "
            "install it with: python -m pip install lunashm"
        )
        return
    if lunashm.__version__ != __version__:
        _do_without(
            f"this extension is version {__version__} but the lunashm package is {lunashm.__version__}, so models are "
            "loaded locally; run: lunashm comfy install PATH_TO_COMFYUI; "
            f"or, where ComfyUI-Manager installed it: python -m pip install lunashm=={__version__}"
        )
        return
    try:
        from lunashm.client import attach as _  # noqa: F401, PLC0415 - what it needs may be missing
    except ImportError as exc:
        _do_without(
            f"the lunashm package is installed, but not what it needs ({exc}), so models are loaded locally; "
            "'python -m pip check' names it"
        )
        return
    from . import attach  # noqa: PLC0415 - needs lunashm

    attach.install()


def _do_without(reason: str) -> None:
    asking.unavailable = reason
    _log.warning("[lunashm] %s", reason)


try:
    import comfy.sd  # noqa: F401
except ImportError:
    pass  # imported outside ComfyUI, by a tool that only looks: there is nothing to hook
else:
    from . import nodes

    NODE_CLASS_MAPPINGS.update(nodes.NODE_CLASS_MAPPINGS)
    NODE_DISPLAY_NAME_MAPPINGS.update(nodes.NODE_DISPLAY_NAME_MAPPINGS)

    _start()

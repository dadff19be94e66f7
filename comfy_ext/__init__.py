"""lunashm for ComfyUI: stock loaders attach to a host by themselves. Knows the client library, never the host.

Reads: trace.py sees what a stock loader does with a file, binding.py puts the host's bytes in its place, patcher.py
keeps ComfyUI from moving or writing them, attach.py hooks the loaders.
"""

import logging

NODE_CLASS_MAPPINGS: dict[str, type] = {}

__version__ = "0.1.0"

_log = logging.getLogger("lunashm.comfy")


def _start() -> None:
    try:
        import lunashm  # noqa: PLC0415 - may be missing
    except ImportError:
        _log.warning(
            "[lunashm] the lunashm package is not installed in this Python, so models are loaded locally; "
            "install it with: python -m pip install lunashm"
        )
        return
    if lunashm.__version__ != __version__:
        _log.warning(
            "[lunashm] this extension is version %s but the lunashm package is %s, so models are loaded locally; "
            "run: lunashm comfy install PATH_TO_COMFYUI",
            __version__, lunashm.__version__,
        )  # fmt: skip
        return
    from . import attach  # noqa: PLC0415 - needs lunashm

    attach.install()


try:
    import comfy.sd  # noqa: F401
except ImportError:
    pass  # imported outside ComfyUI, by a tool that only looks: there is nothing to hook
else:
    _start()

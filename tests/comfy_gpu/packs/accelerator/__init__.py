"""A pack for tests: what a ComfyUI on the stand-in accelerator holds there, and a node that takes memory.

lunashm's views of a GPU's memory are tensors on this device; see ``torch_npu.views``.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import torch
import torch_npu.views
from aiohttp import web
from server import PromptServer

torch_npu.views.install_views()
if os.environ.get("LUNASHM_TEST_DYNAMIC_VRAM"):  # what ComfyUI's main.py does where comfy-aimdo finds a driver
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
_routes = PromptServer.instance.routes


@_routes.get("/standin/memory")
async def memory(_: web.Request) -> web.Response:
    """Of each device: what the allocator counted, and the driver's free and total bytes."""
    found = []
    for device in range(torch.npu.device_count()):
        free, total = torch.npu.mem_get_info(device)
        found.append(torch.npu.facts(device) | {"free": free, "total": total})
    return web.json_response(found)


@_routes.post("/standin/reset")
async def reset(_: web.Request) -> web.Response:
    for device in range(torch.npu.device_count()):
        torch.npu.reset_peak_memory_stats(device)
    return web.json_response({})


@_routes.get("/standin/models")
async def models(_: web.Request) -> web.Response:
    """Of each loaded model: how many tensors and bytes it has by device; ``(lent)``: of memory that is not torch's."""
    return web.json_response([_account(loaded.model) for loaded in management.current_loaded_models])


def _account(patcher: Any) -> dict[str, Any]:
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in patcher.model.state_dict().values():
        place = str(tensor.device) + (" (lent)" if tensor.is_npu and not torch.npu.owns(tensor) else "")
        tensors[place] += 1
        nbytes[place] += tensor.nbytes
    return {
        "model": type(patcher.model).__name__,
        "patcher": type(patcher).__name__,
        "load_device": str(patcher.load_device),
        "loaded_nbytes": patcher.loaded_size(),
        "tensors": tensors,
        "nbytes": nbytes,
    }


class TakeMemory:
    """Takes memory of the device, uses it, and lets go of it."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"nbytes": ("INT", {"max": 1 << 40})}}

    RETURN_TYPES = ()
    FUNCTION = "take"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def take(self, nbytes: int) -> dict[str, Any]:
        torch.zeros(nbytes, dtype=torch.uint8, device=management.get_torch_device())
        return {}


class UnloadModels:
    """What ComfyUI does when memory runs out: all models off the device, none forgotten."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"nonce": ("INT", {"max": 1 << 40})}}

    RETURN_TYPES = ()
    FUNCTION = "unload"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def unload(self, nonce: int) -> dict[str, Any]:
        management.unload_all_models()
        return {}


NODE_CLASS_MAPPINGS = {"TakeMemory": TakeMemory, "UnloadModels": UnloadModels}

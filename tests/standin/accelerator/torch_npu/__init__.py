"""The stand-in accelerator as a torch backend: tensors on ``npu:0``, ``npu:1``... in the stand-in driver's memory.

It has this name because ComfyUI imports it: it runs on Ascend's NPUs through a package called so, and on whatever else
is one. ``tests.standin.build.environment(accelerator=True)`` starts a process that finds it. ``torch.npu`` is
``torch_npu.npu``; ``torch_npu.views`` puts tensors over the memory that a lunashm host lends.
"""

from __future__ import annotations

import os

import torch

torch.utils.rename_privateuse1_backend("npu")
torch.ops.load_library(os.environ["LUNASHM_STANDIN_ACCELERATOR"])

from torch_npu import npu  # noqa: E402

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()

# There is one accelerator here, and it is not torch's CUDA. That one would find the stand-in driver, and stumble over
# what it lacks with a warning; and a CUDA version makes ComfyUI ask CUDA for the figures of this device.
torch.cuda.is_available = lambda: False
torch.cuda.device_count = lambda: 0
torch.version.cuda = None

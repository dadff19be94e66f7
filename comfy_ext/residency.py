"""Which of a shared model's tensors are on the device that computes.

Weights whose home is that device are used where they are. Weights in RAM (the RAM tier) are copied to a GPU by stock's
own loader, all or as many as fit, the rest cast layer by layer. What stock does next never happens here: copying back.
Offloading drops the GPU's copies, and the parameters show the host's bytes again.

What is private to this process (buffers, what a loader made itself) moves as stock moves it.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from .binding import Binding, binding_of
from .layers import nbytes_of
from .weight_hooks import HookedPatcher

_NO_LIMIT = 1e32
"""As ComfyUI has it, and its log lines leave it out."""


class ResidentPatcher(HookedPatcher):
    """The part of a shared model's patcher that knows where its tensors are."""

    @property
    def _copies(self) -> bool:
        """Whether the device that computes needs copies of the shared weights."""
        binding = binding_of(self.model)
        return binding is not None and self.load_device != binding.home

    # -- sizes: what this process takes of the device's memory; ComfyUI plans with it ------------------------------

    def model_size(self) -> int:
        """Shared bytes on the device itself are nobody's to free, and its free memory has been less by them from the
        start: counting them here would count them twice."""
        binding = binding_of(self.model)
        if binding is None:
            size: int = super().model_size()
            return size
        own = binding.private_nbytes + binding.layers.nbytes
        return own + (binding.shared_nbytes if self._copies else nbytes_of(self.model, self.backup))

    def loaded_size(self) -> int:
        return min(super().loaded_size(), self.model_size())

    # -- to the device ---------------------------------------------------------------------------------------------

    def _load_weights(self, budget_nbytes: float, force_patch_weights: bool, full_load: bool) -> None:
        """Stock's load. ``budget_nbytes``: what may be on the device then, where it needs copies."""
        if not self._copies:
            super().load(self.load_device, _NO_LIMIT, force_patch_weights=force_patch_weights, full_load=True)
            self.model.model_loaded_weight_memory = self.model_size()
            return
        super().load(self.load_device, budget_nbytes, force_patch_weights=force_patch_weights, full_load=full_load)
        for key, injection in self._layers.injections.items():  # patched around the layer: not again when it is cast
            functions = getattr(injection.module, "weight_function", None)
            if functions:
                injection.module.weight_function = [f for f in functions if not _patches(f, key)]
        self.model.model_loaded_weight_memory = self._resident_nbytes() + self._layers.nbytes

    def _resident_nbytes(self) -> int:
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(tensor.nbytes for tensor in tensors if tensor.device == self.load_device)

    # -- and away again ----------------------------------------------------------------------------------------------

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        """Bytes freed. Weights that are at home free none: then stock goes on and unloads the model."""
        binding = binding_of(self.model)
        if binding is None or not self._copies:
            return 0
        freed = 0
        with self.use_ejected():
            for module in self._droppable(binding):
                if freed >= memory_to_free:
                    break
                freed += self._drop(module, binding)
        if freed:
            self.model.model_lowvram = True
            self.model.model_loaded_weight_memory -= freed
        return freed

    def _droppable(self, binding: Binding) -> list[torch.nn.Module]:
        """Layers that can cast weights from home at each call and whose weights here are nothing but copies; smallest
        first, as stock has it."""
        changed = {key.rpartition(".")[0] for key in (*self.backup, *self.hook_backup)}
        found = [
            module
            for path, module in self.model.named_modules()
            if hasattr(module, "comfy_cast_weights") and path not in changed and self._copied(module, binding)
        ]
        return sorted(found, key=lambda module: sum(tensor.nbytes for tensor in self._copied(module, binding).values()))

    def _copied(self, module: torch.nn.Module, binding: Binding) -> dict[str, torch.Tensor]:
        """Parameters of the module itself that are copies of shared ones."""
        return {
            name: tensor
            for name, tensor in module._parameters.items()
            if tensor is not None and tensor.device != binding.home and (id(module), name) in binding.places
        }

    def _drop(self, module: torch.nn.Module, binding: Binding) -> int:
        copied = self._copied(module, binding)
        binding.bind_home(module)
        if not hasattr(module, "prev_comfy_cast_weights"):
            module.prev_comfy_cast_weights = module.comfy_cast_weights
        module.comfy_cast_weights = True
        module.comfy_patched_weights = False
        return sum(tensor.nbytes for tensor in copied.values())

    def _go_home(self, device_to: Any) -> None:
        """Everything shared is at home; what is private goes to RAM if ComfyUI wants the model off its device."""
        binding = binding_of(self.model)
        if binding is None:
            return
        if self._copies:
            binding.bind_home()
        if device_to is not None and not _keeps_models():
            binding.move_private(self.model, self.load_device, torch.device("cpu"))


def _patches(function: Any, key: str) -> bool:
    return isinstance(function, comfy.model_patcher.LowVramPatch) and function.key == key


def _keeps_models() -> bool:
    return bool(comfy.model_management.vram_state == comfy.model_management.VRAMState.HIGH_VRAM)

"""A ModelPatcher that never moves, writes, pins or counts shared bytes.

Patched weights (LoRA, model merges) become private tensors of the touched layers for as long as they are patched;
the shared alias is what "unpatched" means.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from .binding import Binding
from .trace import UntraceableError

log = logging.getLogger("lunashm.comfy")

_HOST_ATTRIBUTE = "lunashm"


def binding_of(model: torch.nn.Module) -> Binding | None:
    """The binding of a root module, or None where nothing is shared (a deep copy, say)."""
    return getattr(model, _HOST_ATTRIBUTE, None)


def check_adoptable(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Raises UntraceableError for a patcher that is not ComfyUI's plain one: its own ways with weights are unknown."""
    if type(patcher) not in (comfy.model_patcher.ModelPatcher, SharedModelPatcher):
        raise UntraceableError(f"{type(patcher).__name__} manages its weights itself and cannot share them")


def protect_weights() -> None:
    """Keep patchers that are not ours from writing into shared weights: a pack may wrap a shared model in its own.

    ``comfy.utils.copy_to_param`` is the one function of ComfyUI 0.28 that writes weights in place; on a module with a
    binding the parameter is replaced instead.
    """
    stock = comfy.utils.copy_to_param

    def copy_to_param(obj: Any, attr: str, value: torch.Tensor) -> None:
        if binding_of(obj) is None:
            stock(obj, attr, value)
            return
        before = comfy.utils.get_attr(obj, attr)
        comfy.utils.set_attr_param(obj, attr, value.to(device=before.device, dtype=before.dtype, copy=True))

    comfy.utils.copy_to_param = copy_to_param


def adopt(patcher: comfy.model_patcher.ModelPatcher, binding: Binding) -> None:
    """Turn a stock patcher that was just made into a shared one, in place.

    In place, because ComfyUI's list of loaded models may hold it already (on CPU a CLIP is loaded while it is made).
    """
    setattr(patcher.model, _HOST_ATTRIBUTE, binding)
    patcher.__class__ = SharedModelPatcher
    patcher.size = 0
    patcher.weight_inplace_update = False
    patcher.model.model_loaded_weight_memory = 0


class SharedModelPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """Same constructor as ModelPatcher: ``clone()`` calls it."""

    def is_dynamic(self) -> bool:
        return False

    # -- sizes: private bytes only, the shared ones are nobody's to free -----------------------------------------------

    def model_size(self) -> int:
        binding = binding_of(self.model)
        return super().model_size() if binding is None else binding.private_nbytes

    def loaded_size(self) -> int:
        return min(super().loaded_size(), self.model_size())

    # -- staying current -----------------------------------------------------------------------------------------------

    def keep_current(self) -> None:
        """Before a run: if the host died and another is there, take the same bytes from that one."""
        binding = binding_of(self.model)
        renewals = binding.renewals() if binding is not None else []
        if renewals:
            self.unpatch_model(None, unpatch_weights=True)
        for file, attachment in renewals:
            file.switch(attachment)

    # -- loading: nothing to move, only patches to apply ---------------------------------------------------------------

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        # ComfyUI 0.28: returns the bytes that were moved to the device; shared weights move none.
        self.keep_current()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            loaded = self.model.current_weight_patches_uuid
            if loaded is not None and (loaded != self.patches_uuid or force_patch_weights):
                self.unpatch_model(None, unpatch_weights=True)
                loaded = None
            else:
                self.unpatch_model(None, unpatch_weights=False)
            self.patch_model(load_weights=False)
            if loaded is not None:
                self.apply_hooks(self.forced_hooks, force_apply=True)
                return 0
            try:
                self.load(device_to, full_load=True)
            except Exception:
                self.detach()
                raise
        return 0

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        super().load(self.load_device, force_patch_weights=force_patch_weights, full_load=True)
        self.model.model_loaded_weight_memory = self.model_size()

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(None, unpatch_weights=unpatch_weights)

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        # ComfyUI 0.28: partially_unload() returns bytes freed; shared weights free none, so it goes on to detach().
        return 0

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, **kwargs: Any
    ) -> Any:
        return super().patch_weight_to_device(key, device_to, inplace_update=False, **kwargs)

    def pin_weight_to_device(self, key: str) -> None:
        pass  # pinning would lock every client's pages

    def unpin_weight(self, key: str) -> None:
        pass

    def unpin_all_weights(self) -> None:
        pass

    # -- weight hooks: stock copies into the weights, here the touched ones are replaced -------------------------------

    def patch_cached_hook_weights(self, cached_weights: dict[str, Any], key: str, memory_counter: Any) -> None:
        self._keep_for_hooks(key)
        weight, device = cached_weights[key]
        comfy.utils.set_attr_param(self.model, key, weight.to(device=device))

    def patch_hook_weight_to_device(
        self,
        hooks: Any,
        combined_patches: dict[str, Any],
        key: str,
        original_weights: dict[str, Any],
        memory_counter: Any,
    ) -> None:
        if key not in combined_patches:
            return
        weight = self._keep_for_hooks(key)
        merged = comfy.lora.calculate_weight(
            combined_patches[key],
            weight.to(device=weight.device, dtype=torch.float32, copy=True),
            key,
            original_weights=original_weights,
        )
        original_weights.pop(key, None)
        merged = comfy.float.stochastic_rounding(merged, weight.dtype, seed=comfy.utils.string_to_seed(key))
        comfy.utils.set_attr_param(self.model, key, merged)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = (merged, weight.device)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        with self.use_ejected():
            for key in [k for k in self.hook_backup if not whitelist_keys_set or k in whitelist_keys_set]:
                comfy.utils.set_attr_param(self.model, key, self.hook_backup.pop(key)[0])
            if not whitelist_keys_set:
                self.current_hooks = None

    def _keep_for_hooks(self, key: str) -> torch.Tensor:
        """The weight as it was before hooks: an alias, kept without copying. Hooks always start from it."""
        if key not in self.hook_backup:
            weight = comfy.utils.get_attr(self.model, key)
            self.hook_backup[key] = (weight, weight.device)
        backup: torch.Tensor = self.hook_backup[key][0]
        return backup

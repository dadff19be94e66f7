"""Weight hooks on shared weights: stock copies into the weights; here the layers' updates are exchanged."""

from __future__ import annotations

from typing import Any

import comfy.float
import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch

from lunashm.client.lowrank import UnsupportedLayer, Update

from .binding import binding_of
from .layers import PatchedLayers

_seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed  # where 0.8 has it

NOT_AROUND_ITS_LAYER = (UnsupportedLayer, RuntimeError, ValueError, IndexError)
"""The last three: factors of shapes that nobody foresaw are stock's to judge."""


class HookedPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """The part of a shared model's patcher that hooks go through; hooks come on top of its patches."""

    @property
    def _layers(self) -> PatchedLayers:
        binding = binding_of(self.model)
        return PatchedLayers() if binding is None else binding.layers

    def _make_private(self, key: str) -> None:
        """Merge one patch that is around its layer into a private weight after all: something needs the weight."""
        if self._layers.take_off(key):
            self.patch_weight_to_device(key, device_to=self.load_device)

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
        patches = [*self.patches.get(key, []), *combined_patches[key]]
        try:
            if key in self.backup:
                raise UnsupportedLayer("a private copy already")
            done = self._layers.update_for(self.model, key, patches, original_weights)
            self._layers.put_hook(self.model, key, done)
        except NOT_AROUND_ITS_LAYER:
            done = self._merge_hook(combined_patches[key], key, original_weights)
            comfy.utils.set_attr_param(self.model, key, done)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = (done, self.load_device)

    def patch_cached_hook_weights(self, cached_weights: dict[str, Any], key: str, memory_counter: Any) -> None:
        done = cached_weights[key][0]
        if isinstance(done, Update) and key not in self.backup:
            if key in self.hook_backup:  # another group's tensor
                comfy.utils.set_attr_param(self.model, key, self.hook_backup.pop(key)[0])
            self._layers.put_hook(self.model, key, done)
        elif isinstance(done, Update):  # merged privately since, base patches included
            self._keep_for_hooks(key)
            base = self.hook_backup[key][0]
            raw = self.backup[key].weight
            comfy.utils.set_attr_param(self.model, key, done.apply_to(raw).to(base.dtype))
        else:
            self._keep_for_hooks(key)
            comfy.utils.set_attr_param(self.model, key, done)

    def _merge_hook(self, patches: list[Any], key: str, original_weights: dict[str, Any]) -> torch.Tensor:
        """A tensor that no layer is called for, with a hook's patches: a private one, small."""
        weight = self._keep_for_hooks(key)
        base = weight.to(device=weight.device, dtype=torch.float32, copy=True)
        merged = comfy.lora.calculate_weight(patches, base, key, original_weights=original_weights)
        return comfy.float.stochastic_rounding(merged, weight.dtype, seed=_seed(key))

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        with self.use_ejected():
            self._layers.unhook(whitelist_keys_set or None)
            for key in [k for k in self.hook_backup if not whitelist_keys_set or k in whitelist_keys_set]:
                comfy.utils.set_attr_param(self.model, key, self.hook_backup.pop(key)[0])
            if not whitelist_keys_set:
                self.current_hooks = None

    def _keep_for_hooks(self, key: str) -> torch.Tensor:
        """The weight as it was before hooks: an alias, kept without copying. Hooks always start from it."""
        self._make_private(key)  # hooks come on top of the patched weight
        if key not in self.hook_backup:
            weight = comfy.utils.get_attr(self.model, key)
            self.hook_backup[key] = (weight, weight.device)
        backup: torch.Tensor = self.hook_backup[key][0]
        return backup

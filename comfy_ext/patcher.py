"""A ModelPatcher that never moves, writes, pins or counts shared bytes.

Patches that have a low-rank form (LoRA and its kin) are put around the layers; the others (model merges, full
differences) become private tensors of the touched layers for as long as they are patched. Either way the shared
alias is what "unpatched" means.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import comfy.controlnet
import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from lunashm.client.lowrank import Injection, UnsupportedLayer, inject

from .adapters import update_of
from .binding import Binding
from .hostlink import size
from .trace import UntraceableError

log = logging.getLogger("lunashm.comfy")

_HOST_ATTRIBUTE = "lunashm"

_READ_DIRECTLY = ("position_embedding.weight", "lm_head.weight")
"""Weights that ComfyUI 0.28 reads without calling their module: nothing put around its forward would be seen."""


def binding_of(model: torch.nn.Module) -> Binding | None:
    """The binding of a root module, or None where nothing is shared (a deep copy, say)."""
    return getattr(model, _HOST_ATTRIBUTE, None)


def show_patched_weights() -> None:
    """ControlLora copies the UNet's weights, patches included: have them merged, as in stock, before it looks."""
    stock = comfy.controlnet.ControlLora.pre_run

    def pre_run(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        patcher = getattr(model, "current_patcher", None)
        if isinstance(patcher, SharedModelPatcher):
            patcher.make_all_private("a ControlLora reads them")
        stock(self, model, *args, **kwargs)

    comfy.controlnet.ControlLora.pre_run = pre_run


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
        if binding is None:
            return super().model_size()
        return binding.private_nbytes + sum(injection.nbytes for injection in binding.injections.values())

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
        reasons = self._inject_low_rank()
        super().load(self.load_device, force_patch_weights=force_patch_weights, full_load=True)
        self.model.model_loaded_weight_memory = self.model_size()
        self._report_patches(reasons)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            for key in reversed(list(self._injections)):
                self._injections.pop(key).remove()
        super().unpatch_model(None, unpatch_weights=unpatch_weights)

    # -- low-rank patches ----------------------------------------------------------------------------------------------

    @property
    def _injections(self) -> dict[str, Injection]:
        """On the model, as clones share it: whoever is loaded next takes off what another clone put on."""
        binding = binding_of(self.model)
        return {} if binding is None else binding.injections

    def _inject_low_rank(self) -> Counter[str]:
        """Put every patch that has a low-rank form around its layer; returns why the others have none."""
        reasons: Counter[str] = Counter()
        binding = binding_of(self.model)
        for key in [] if binding is None else self.patches:
            if key in self._injections or key in self.backup:
                continue
            try:
                module, weight = self._layer(key)
                update = update_of(self.patches[key], weight)
                if update.rank * (weight.shape[0] + weight[0].numel()) > weight.numel():
                    raise UnsupportedLayer("a rank sum that costs more than the layer itself")
                injection = inject(module, update)
            except (UnsupportedLayer, RuntimeError, ValueError, IndexError) as exc:
                reasons[str(exc)] += 1  # factors of shapes nobody foresaw are stock's to judge
            else:
                self._injections[key] = injection
        return reasons

    def _layer(self, key: str) -> tuple[torch.nn.Module, torch.Tensor]:
        """Raises UnsupportedLayer for what is not the weight of a layer that is called."""
        path, _, name = key.rpartition(".")
        if name != "weight" or key.endswith(_READ_DIRECTLY):
            raise UnsupportedLayer("a bias, or a weight that is read without calling its layer")
        weight, set_function, convert_function = comfy.model_patcher.get_key_weight(self.model, key)
        if set_function is not None or convert_function is not None:
            raise UnsupportedLayer("a quantised weight")
        return comfy.utils.get_attr(self.model, path), weight

    def _make_private(self, key: str) -> None:
        """Merge one injected patch into a private weight after all: something needs to see the weight itself."""
        injection = self._injections.pop(key, None)
        if injection is not None:
            injection.remove()
            self.patch_weight_to_device(key, device_to=self.load_device)

    def _report_patches(self, reasons: Counter[str]) -> None:
        if not self.patches:
            return
        private = sum(comfy.utils.get_attr(self.model, key).nbytes for key in self.backup)
        low_rank = sum(injection.nbytes for injection in self._injections.values())
        why = "".join(f"; {count} for {reason}" for reason, count in reasons.most_common(3))
        log.info(
            "[lunashm] %s patched: %d layers low-rank (%s), %d private (%s)%s",
            type(self.model).__name__, len(self._injections), size(low_rank), len(self.backup), size(private), why,
        )  # fmt: skip

    def make_all_private(self, why: str) -> None:
        """Merge every low-rank patch after all, because somebody needs the weights themselves."""
        if self._injections:
            log.info("[lunashm] merging %d patched layers into private copies: %s", len(self._injections), why)
        for key in list(self._injections):
            self._make_private(key)

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        self.make_all_private("the model is saved")
        return super().model_state_dict_for_saving(*args, **kwargs)

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        # ComfyUI 0.28: partially_unload() returns bytes freed; shared weights free none, so it goes on to detach().
        return 0

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, **kwargs: Any
    ) -> Any:
        if key in self._injections and not kwargs.get("return_weight"):
            return None  # it is around the layer already
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
        self._make_private(key)  # hooks come on top of the patched weight
        if key not in self.hook_backup:
            weight = comfy.utils.get_attr(self.model, key)
            self.hook_backup[key] = (weight, weight.device)
        backup: torch.Tensor = self.hook_backup[key][0]
        return backup

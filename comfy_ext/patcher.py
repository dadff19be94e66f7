"""A ModelPatcher that never moves, writes, pins or counts shared bytes.

Patches are put around the layers (``layers.py``); what cannot be (biases, norms) becomes private tensors for as long as
it is patched. Either way the shared alias is what "unpatched" means.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.utils
import torch

from lunashm import settings

from . import failstop
from .binding import ATTRIBUTE, Binding, binding_of
from .layers import Rungs, nbytes_of
from .residency import ResidentPatcher
from .trace import UntraceableError
from .units import size
from .weight_hooks import NOT_AROUND_ITS_LAYER

log = logging.getLogger("lunashm.comfy")


def _raise_out_of_memory(exc: Exception) -> None:
    """No reason to copy: OutOfMemoryError of a GPU, DefaultCPUAllocator's plain RuntimeError."""
    if isinstance(exc, torch.OutOfMemoryError) or "not enough memory" in str(exc):
        raise exc


class PrivateBudgetError(RuntimeError):
    """Patches would copy more of the shared weights than ``private_gb`` allows; the model is as it was."""


def show_patched_weights() -> None:
    """ControlLora and, in ComfyUI 0.8, CLIPSave copy weights, patches included: have them merged before they look."""
    stock = comfy.controlnet.ControlLora.pre_run

    def pre_run(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        patcher = getattr(model, "current_patcher", None)
        if isinstance(patcher, SharedModelPatcher):
            patcher.make_all_private("a ControlLora reads them")
        stock(self, model, *args, **kwargs)

    comfy.controlnet.ControlLora.pre_run = pre_run
    stock_get_sd = comfy.sd.CLIP.get_sd

    def get_sd(self: Any) -> Any:
        if isinstance(self.patcher, SharedModelPatcher):
            self.patcher.make_all_private("the text encoder is saved")
        return stock_get_sd(self)

    comfy.sd.CLIP.get_sd = get_sd


def check_adoptable(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Raises UntraceableError for a patcher that is not ComfyUI's own: its ways with weights are unknown.

    0.28's VAE and CLIP vision have no ``disable_dynamic``; a ModelPatcherDynamic that has not loaded anything yet
    differs from a plain one by its class alone.
    """
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", comfy.model_patcher.ModelPatcher)
    if type(patcher) not in (comfy.model_patcher.ModelPatcher, dynamic, SharedModelPatcher):
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
    Its offload device is the weights' home: what stock brings there is an alias, not a copy.
    """
    setattr(patcher.model, ATTRIBUTE, binding)
    failstop.guard(patcher.model, binding)
    patcher.__class__ = SharedModelPatcher
    patcher.offload_device = binding.home
    patcher.size = 0
    patcher.weight_inplace_update = False
    patcher.model.model_loaded_weight_memory = 0


class SharedModelPatcher(ResidentPatcher):
    """Same constructor as ModelPatcher: ``clone()`` calls it."""

    def is_dynamic(self) -> bool:
        return False

    # -- staying current -----------------------------------------------------------------------------------------------

    def keep_current(self) -> None:
        """Before a run: if the host died and another is there, take the same bytes from that one.

        Raises HostLost where the weights went with the host and nobody has them.
        """
        binding = binding_of(self.model)
        renewals = binding.renewals(failstop.reopened) if binding is not None else []
        if binding is None or not renewals:
            return
        self.unpatch_model(None, unpatch_weights=True)
        for file, attachment in renewals:
            file.switch(attachment)
        failstop.guard(self.model, binding)

    # -- loading: patches to apply, and only in the RAM tier something to move -----------------------------------------

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> float:
        """Bytes that were copied to the device; ``extra_memory``: how many more than now may be there, or fewer."""
        budget = self.loaded_size() + extra_memory
        self.keep_current()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            loaded = self.model.current_weight_patches_uuid
            whole = loaded is not None and (force_patch_weights or self._hides_forwards())
            self.unpatch_model(None, unpatch_weights=whole)
            self.patch_model(load_weights=False)
            try:
                loaded = self.model.current_weight_patches_uuid
                if loaded is not None and loaded != self.patches_uuid and not self._exchange_patches(device_to):
                    self.unpatch_model(None, unpatch_weights=True)
                    self.patch_model(load_weights=False)
                    loaded = None
                return self._load_within(budget, loaded is not None, force_patch_weights)
            except Exception:
                self.detach()
                raise

    def _load_within(self, budget_nbytes: float, patched: bool, force_patch_weights: bool) -> float:
        """``patched``: its patches are on it already, so that only weights that it copies are to be moved, or none."""
        before = self.model.model_loaded_weight_memory
        if patched and self._copies and budget_nbytes < before:
            self.partially_unload(self.offload_device, before - budget_nbytes)
        elif patched and not (self._copies and self.model.model_lowvram):
            self.apply_hooks(self.forced_hooks, force_apply=True)
        else:
            full_load = budget_nbytes > self.model_size()
            self.load(self.load_device, budget_nbytes, force_patch_weights, full_load)
        return max(self.model.model_loaded_weight_memory - before, 0) if self._copies else 0

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        self.unpatch_hooks()
        reasons: Counter[str] = Counter()
        if force_patch_weights:  # somebody will look at the weights themselves: ComfyUI 0.8 before it saves them, packs
            self._layers.take_off_all()
            reasons["being asked for merged weights"] = len(self.patches)
        else:
            reasons = self._put_around_layers()
        self._load_weights(lowvram_model_memory, force_patch_weights, full_load)
        self._mark_unmerged()
        self._layers.exchangeable = self._loads_plainly
        self._report_patches(reasons)

    def _mark_unmerged(self) -> None:
        """ComfyUI 0.28 merges a tensor when it is saved or extracted, if its module does not say it is patched."""
        for injection in self._layers.injections.values():
            injection.module.comfy_patched_weights = False

    def _hides_forwards(self) -> bool:
        """Whether an object patch, old or new, replaces the forward of a layer that something is around."""
        patched = {key.removesuffix(".forward") for key in (*self.object_patches, *self.object_patches_backup)}
        keys = (*self._layers.injections, *self.patches) if patched else ()
        return any(key.rpartition(".")[0] in patched for key in keys)

    @property
    def _loads_plainly(self) -> bool:
        """Whether loading does nothing to the modules but apply patches."""
        return not self.weight_wrapper_patches and not self.force_cast_weights and not self.backup

    def _exchange_patches(self, device_to: Any) -> bool:
        """From one stack of patches to another without loading the model again, where both are around their layers.

        False, with nothing lost, where that cannot be: then everything is taken off and the model loaded as ever.
        """
        layers = self._layers
        if not layers.exchangeable or not self._loads_plainly:
            return False
        self.unpatch_hooks()
        try:
            patches = self._patches_of_present_layers()
            updates = {key: layers.update_for(self.model, key, patches[key]) for key in patches}
            layers.exchange(self.model, updates)
        except NOT_AROUND_ITS_LAYER as exc:
            _raise_out_of_memory(exc)
            return False
        self._mark_unmerged()
        self.model.current_weight_patches_uuid = self.patches_uuid
        if not self._copies:
            self.model.model_loaded_weight_memory = self.model_size()
        self._report_patches(Counter())
        for callback in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
            callback(self, device_to, 0, False, True)
        return True

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        self.eject_model()
        if unpatch_weights:
            self._layers.take_off_all()
        super().unpatch_model(None, unpatch_weights=unpatch_weights)
        if unpatch_weights:
            self._go_home(device_to)

    # -- patches: around the layers, or in private tensors -------------------------------------------------------------

    @property
    def rungs(self) -> Rungs:
        """How the patches that are applied now were done, layer by layer counted."""
        return self._layers.rungs

    def _patches_of_present_layers(self) -> dict[str, Any]:
        """A pack's object patch may have replaced a layer by something without such a weight: stock skips it, too."""
        present = {name for name, _ in self.model.named_parameters()}
        return {key: patches for key, patches in self.patches.items() if key in present}

    def _put_around_layers(self) -> Counter[str]:
        """Everything that needs no copy; returns why the rest does. Raises PrivateBudgetError, with nothing applied."""
        reasons: Counter[str] = Counter()
        binding, layers = binding_of(self.model), self._layers
        private: list[str] = []
        for key in [] if binding is None else self._patches_of_present_layers():
            if key in layers or key in self.backup:
                continue
            try:
                layers.put(self.model, key, layers.update_for(self.model, key, self.patches[key]))
            except NOT_AROUND_ITS_LAYER as exc:
                _raise_out_of_memory(exc)
                reasons[str(exc)] += 1
                private.append(key)
        self._check_budget(private, reasons)
        return reasons

    def _check_budget(self, keys: list[str], reasons: Counter[str]) -> None:
        if not keys:
            return  # the usual case: the settings' file need not be read
        budget, needed = settings.load().private_gb * 1e9, nbytes_of(self.model, keys)
        if needed <= budget:
            return
        largest = max(keys, key=lambda key: nbytes_of(self.model, [key]))
        raise PrivateBudgetError(
            f"[lunashm] {len(keys)} patched tensors of {type(self.model).__name__} need private copies of "
            f"{size(needed)}, the largest {largest} ({reasons.most_common(1)[0][0]}); allowed are "
            f"{size(int(budget))}. Raise private_gb (LUNASHM_PRIVATE_GB), or leave out the LoRA that patches them"
        )

    def _report_patches(self, reasons: Counter[str]) -> None:
        rungs = self._layers.count(self.model, list(self.backup), reasons)
        if not self.patches:
            return
        name = type(self.model).__name__
        log.info("[lunashm] %s patched: %s", name, rungs)
        merged = [key for key in self.patches if any(isinstance(patch[1], list) for patch in self.patches[key])]
        if merged and rungs.transient and not self._layers.said_merge:
            self._layers.said_merge = True
            log.warning(
                "[lunashm] %s is a merge: %d layers (%s) are merged anew at every step, which costs time, not memory; "
                "to have it fast, save the merged checkpoint once and load that",
                name, len(merged), size(nbytes_of(self.model, merged)),
            )  # fmt: skip

    def make_all_private(self, why: str) -> None:
        """Merge every patch into private weights after all, because somebody needs the weights themselves."""
        keys = list(self._layers.injections)
        if keys:
            log.info("[lunashm] merging %d patched layers into private copies: %s", len(keys), why)
        for key in keys:
            self._make_private(key)

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, return_weight: bool = False, **kwargs: Any
    ) -> Any:
        if return_weight:
            if key in self.backup:
                return comfy.utils.get_attr(self.model, key)  # patched already
            return super().patch_weight_to_device(key, device_to, return_weight=True, **kwargs)
        if key in self._layers or key in self.backup:
            return None  # it is around the layer already, or merged
        return super().patch_weight_to_device(key, device_to, inplace_update=False, **kwargs)

    def pin_weight_to_device(self, key: str) -> None:
        pass  # pinning would lock every client's pages

    def unpin_weight(self, key: str) -> None:
        pass

    def unpin_all_weights(self) -> None:
        pass

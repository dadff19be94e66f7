"""Files by peft, in PEFT's own keys and, through diffusers' converters and savers, in diffusers' and kohya's.

What ComfyUI 0.28 cannot read of peft's is not made: attention layers of a UNet in PEFT keys, peft's forms of IA3, OFT,
BOFT and GLoRA, magnitudes under peft's name and in peft's shape (see ``_dora``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.comfy.lora_files import skeletons

Tensors = dict[str, torch.Tensor]

RANK = 4
UNET = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv2", "ff.net.0.proj", "time_emb_proj", "conv_in")
UNET_BUT_ATTENTION = tuple(name for name in UNET if not name.startswith("to_"))
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
DIT = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear", "proj_mlp",
    "proj_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "x_embedder", "context_embedder",
)  # fmt: skip


def _adapted(model: torch.nn.Module, kind: str, targets: tuple[str, ...], **settings: Any) -> tuple[Tensors, int]:
    """The adapter of ``kind`` on ``targets``, in peft's own state dict; and on how many layers it is."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = getattr(peft, f"{kind}Config")(r=RANK, target_modules=list(targets), **settings)
    peft.inject_adapter_in_model(config, model)
    skeletons.train({name: p for name, p in model.named_parameters() if p.requires_grad})
    state = peft.get_peft_model_state_dict(model)
    layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, layers


def _prefixed(prefix: str, state: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


def _unet_and_clip_in_kohya_keys(base: Path, out: Path) -> int:
    from diffusers.utils import convert_state_dict_to_kohya

    unet, layers = _adapted(skeletons.unet(), "Lora", UNET, lora_alpha=RANK)
    text, more = _adapted(skeletons.clip(), "Lora", CLIP, lora_alpha=RANK)
    save_file(convert_state_dict_to_kohya(_prefixed("unet.", unet) | _prefixed("text_encoder.", text)), out)
    return layers + more


def _unet_and_clip_in_diffusers_keys(base: Path, out: Path) -> int:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet, layers = _adapted(skeletons.unet(), "Lora", UNET_BUT_ATTENTION, use_rslora=True)
    text, more = _adapted(skeletons.clip(), "Lora", CLIP)
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        out.parent, unet_lora_layers=unet, text_encoder_lora_layers=text, weight_name=out.name
    )
    return layers + more


def _clip_in_old_diffusers_keys(base: Path, out: Path) -> int:
    from diffusers.utils import convert_state_dict_to_diffusers

    text, layers = _adapted(skeletons.clip(), "Lora", CLIP[:4])
    save_file(_prefixed("text_encoder.", convert_state_dict_to_diffusers(text)), out)
    return layers


def _unet_and_clip(kind: str, base: Path, out: Path) -> int:
    """LoHa or LoKr."""
    unet, layers = _adapted(skeletons.mid_block(), kind, UNET_BUT_ATTENTION)
    text, more = _adapted(skeletons.clip(), kind, CLIP[:2])
    save_file(_prefixed("unet.", unet) | _prefixed("text_encoder.", text), out)
    return layers + more


def _dora(state: Tensors) -> Tensors:
    """Magnitudes as ComfyUI reads them: ``dora_scale``, and a column.

    peft has a vector, and (1, out, 1, 1) for a convolution, which ComfyUI takes for one of the inputs.
    """
    scales = {}
    for name, tensor in state.items():
        if name.endswith("lora_magnitude_vector"):
            dim = state[name.replace("lora_magnitude_vector", "lora_A.weight")].dim()
            scales[name.replace("lora_magnitude_vector", "dora_scale")] = tensor.reshape(-1, *[1] * (dim - 1))
        else:
            scales[name] = tensor
    return scales


def _unet_dora(base: Path, out: Path) -> int:
    from diffusers.utils import convert_state_dict_to_kohya

    state, layers = _adapted(skeletons.mid_block(), "Lora", UNET, use_dora=True, lora_alpha=RANK)
    named = _dora(_prefixed("unet.", state))
    scales = {name: tensor for name, tensor in named.items() if name.endswith(".dora_scale")}
    kohya = convert_state_dict_to_kohya({name: tensor for name, tensor in named.items() if name not in scales})
    for name, tensor in scales.items():  # the converter has no place for them
        kohya["lora_" + name.removesuffix(".dora_scale").replace(".", "_") + ".dora_scale"] = tensor
    save_file(kohya, out)
    return layers


def _transformer(saver: str, base: Path, out: Path) -> int:
    """As diffusers' pipelines save it; for SD3 with a text encoder."""
    import diffusers.loaders

    model, text = (skeletons.flux(), {}) if saver.startswith("Flux") else (skeletons.sd3(), None)
    state, layers = _adapted(model, "Lora", DIT, lora_alpha=2 * RANK)
    extra: dict[str, Any] = {}
    if text is None:
        extra["text_encoder_lora_layers"], more = _adapted(skeletons.clip(), "Lora", CLIP)
        layers += more
    loader = getattr(diffusers.loaders, saver)
    loader.save_lora_weights(out.parent, transformer_lora_layers=state, weight_name=out.name, **extra)
    return layers


def _flux(kind: str, base: Path, out: Path, **settings: Any) -> int:
    state, layers = _adapted(skeletons.flux(), kind, DIT, **settings)
    save_file(_prefixed("transformer.", _dora(state)), out)
    return layers


def _flux_with_adapter_name(base: Path, out: Path) -> int:
    """As a script saves it that takes peft's parameters as they are called."""
    model = skeletons.flux()
    _, layers = _adapted(model, "Lora", DIT)
    save_file({name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}, out)
    return layers


def _sd3_by_peft_alone(kind: str, base: Path, out: Path) -> int:
    """``PeftModel.save_pretrained``'s file."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = getattr(peft, f"{kind}Config")(r=RANK, target_modules=list(DIT))
    model = peft.get_peft_model(skeletons.sd3(), config)
    skeletons.train({name: p for name, p in model.named_parameters() if p.requires_grad})
    folder = out.with_suffix("")
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").rename(out)
    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())


FILES = {
    "sd15-tiny": {
        "peft LoRA, kohya keys": _unet_and_clip_in_kohya_keys,
        "peft rsLoRA, diffusers keys": _unet_and_clip_in_diffusers_keys,
        "peft LoRA, old diffusers keys": _clip_in_old_diffusers_keys,
        "peft DoRA, kohya keys": _unet_dora,
        "peft LoHa, diffusers keys": partial(_unet_and_clip, "LoHa"),
        "peft LoKr, diffusers keys": partial(_unet_and_clip, "LoKr"),
    },
    "sd3-tiny": {
        "peft LoRA, diffusers keys": partial(_transformer, "SD3LoraLoaderMixin"),
        "peft LoRA, PEFT keys": partial(_sd3_by_peft_alone, "Lora"),
        "peft LoHa, PEFT keys": partial(_sd3_by_peft_alone, "LoHa"),
        "peft LoKr, PEFT keys": partial(_sd3_by_peft_alone, "LoKr"),
    },
    "flux-tiny": {
        "peft LoRA, diffusers keys": partial(_transformer, "FluxLoraLoaderMixin"),
        "peft LoRA, bare keys with an adapter name": _flux_with_adapter_name,
        "peft DoRA, diffusers keys": partial(_flux, "Lora", use_dora=True),
        "peft LoHa, diffusers keys": partial(_flux, "LoHa"),
        "peft LoKr, diffusers keys": partial(_flux, "LoKr", decompose_both=True, decompose_factor=8),
    },
}

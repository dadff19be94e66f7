"""Files by lycoris-lora, saved by its own ``save_weights``: every algorithm of its that ComfyUI 0.28 reads.

It reads no IA3, nothing of GLoRA's ``bm``, and of fused layers in diffusers' names no bias differences. On LoKr in
Tucker form it fails: the layer stays as it was, with an error in the log. Constraints (which lycoris-lora multiplies by
the number of rows) and OFT's rescaling (which ComfyUI leaves out) mean here what stock makes of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.comfy.lora_files import skeletons

RANK, ALPHA = 4, 2.0
"""Of everything but BOFT: its blocks must be a power of two many."""

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"algo": "lora"},
    "DyLoRA": {"algo": "dylora"},
    "DoRA of outputs": {"algo": "lora", "dora_wd": True},
    "DoRA of inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha"},
    "LoHa with DoRA": {"algo": "loha", "dora_wd": True},
    "LoKr": {"algo": "lokr", "factor": 8},
    "LoKr of two factored sides": {"algo": "lokr", "factor": 8, "decompose_both": True},
    "LoKr of full matrices": {"algo": "lokr", "factor": 8, "full_matrix": True},
    "LoKr with DoRA": {"algo": "lokr", "factor": 8, "dora_wd": True},
    "GLoRA": {"algo": "glora"},
    "OFT": {"algo": "diag-oft"},
    "OFT with a constraint": {"algo": "diag-oft", "constraint": 0.5},
    "BOFT": {"algo": "boft", "rank": 16},
    "OFT rescaled": {"algo": "diag-oft", "rescaled": True},
    "BOFT rescaled with a constraint": {"algo": "boft", "rank": 16, "rescaled": True, "constraint": 0.5},
    "full": {"algo": "full"},
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "LoCon in Tucker form": {"algo": "locon", "use_tucker": True},
    "LoHa in Tucker form": {"algo": "loha", "use_tucker": True},
    "LoRA and norms": {"algo": "lora", "train_norm": True},
}
WITH_TEXT = ("DoRA of outputs", "LoHa", "LoKr", "OFT", "full")
"""For SD1.5 these are for the text encoder too. Not all: a pass of CLIP-L is the slowest part of a check."""
DIFFUSERS_NAMES = tuple(name for name in KINDS if name != "full")


def _train(loras: list[Any]) -> None:
    """Before they are applied: ``full`` then starts at zero, afterwards at the layer's weight."""
    for lora in loras:
        skeletons.train(dict(lora.named_parameters()))


def _save(network: Any, loras: list[Any], out: Path, dtype: torch.dtype) -> int:
    network.save_weights(str(out), dtype, {})
    with_bias = sum(key.endswith((".diff_b", ".b_norm")) for key in network.state_dict())
    return len(loras) + with_bias


def _sd15(kind: dict[str, Any], with_text: bool, base: Path, out: Path) -> int:
    """As kohya's trainer has it made."""
    from lycoris.kohya import create_network

    unet, text = skeletons.mid_block(), skeletons.clip() if with_text else []
    settings = {"rank": RANK, "warn_on_unmatched": False} | kind
    network = create_network(1.0, settings.pop("rank"), ALPHA, None, text, unet, **settings)
    loras = network.unet_loras + network.text_encoder_loras
    _train(loras)
    network.apply_to(text, unet, apply_text_encoder=with_text, apply_unet=True)
    return _save(network, loras, out, torch.float16)


def _wrapped(prefix: str, model: torch.nn.Module, kind: dict[str, Any], out: Path) -> int:
    from lycoris.wrapper import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"lora_prefix": prefix})
    settings = {"rank": RANK, "warn_on_unmatched": False} | kind
    network = create_lycoris(model, 1.0, settings.pop("rank"), ALPHA, **settings)
    _train(network.loras)
    network.apply_to()
    return _save(network, network.loras, out, torch.float32)


def _in_diffusers_names(model: str, kind: dict[str, Any], base: Path, out: Path) -> int:
    """As SimpleTuner has it made: q, k and v apart."""
    return _wrapped("lycoris", getattr(skeletons, model)(), kind, out)


def _in_native_names(prefix: str, parts: tuple[str, ...], kind: dict[str, Any], base: Path, out: Path) -> int:
    """As kohya's trainer has it made for a DiT: q, k and v fused."""
    return _wrapped("lora_unet", skeletons.native(base, prefix, parts), kind, out)


FILES = {
    "sd15-tiny": {
        f"lycoris {name}": partial(_sd15, kind, name in WITH_TEXT) for name, kind in (KINDS | CONVOLUTIONS).items()
    },
    "sd3-tiny": {
        f"lycoris {name}, {style}": maker
        for name in ("LoRA", "LoKr", "OFT", "DoRA of outputs")
        for style, maker in {
            "native names": partial(
                _in_native_names, "model.diffusion_model.", ("joint_blocks.", "final_layer."), KINDS[name]
            ),
            "diffusers names": partial(_in_diffusers_names, "sd3", KINDS[name]),
        }.items()
    },
    "flux-tiny": {
        f"lycoris {name}, diffusers names": partial(_in_diffusers_names, "flux", KINDS[name])
        for name in DIFFUSERS_NAMES
    }
    | {
        f"lycoris {name}, native names": partial(_in_native_names, "", ("_blocks.",), kind)
        for name, kind in KINDS.items()
    },
}

"""Files that no library makes (any more), and scripts write by themselves: forms, keys, kinds that ComfyUI reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.comfy.lora_files import skeletons

Tensors = dict[str, torch.Tensor]

RANK = 4
UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model."
WIDTH = 128
"""Of flux-tiny and sd3-tiny."""


def _pair(rows: int, columns: int, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    """up and down of an update about half as large as a weight."""
    return torch.randn(rows, rank), 0.5 * torch.randn(rank, columns) * (columns * rank) ** -0.5


def _lora(key: str, shape: tuple[int, ...], up: str = ".lora_up.weight", down: str = ".lora_down.weight") -> Tensors:
    b, a = _pair(shape[0], shape[1])
    return {key + up: b, key + down: a}


def _change(shape: tuple[int, ...], size: float = 0.02) -> torch.Tensor:
    return torch.randn(shape) * size


def _old_glora(base: Path, out: Path) -> int:
    """Early LyCORIS: the factors the other way round."""
    tensors: Tensors = {}
    layers = {
        name: shape
        for name, shape in skeletons.shapes_of(base, UNET).items()
        if "middle_block.1.transformer_blocks" in name and name.endswith(".weight") and len(shape) == 2
    }
    for name, (rows, columns) in layers.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        (b2, b1), (a2, a1) = _pair(rows, columns), _pair(columns, columns)
        tensors |= {f"{key}.a1.weight": a1, f"{key}.a2.weight": a2, f"{key}.b1.weight": b1, f"{key}.b2.weight": b2}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, out)
    return len(layers)


def _attention_processors(base: Path, out: Path) -> int:
    """Diffusers before it used peft: LoRAs belonged to the attention processors."""
    attention = "mid_block.attentions.0.transformer_blocks.0.attn{}.processor.to_{}"
    tensors: Tensors = {}
    for number, name in ((1, "q"), (1, "k"), (1, "v"), (1, "out"), (2, "q"), (2, "out")):
        tensors |= _lora("unet." + attention.format(number, name), (320, 320), "_lora.up.weight", "_lora.down.weight")
    save_file(tensors, out)
    return len(tensors) // 2


def _differences_and_replacements(base: Path, out: Path) -> int:
    """Whole weights and biases, of a convolution, a linear layer, a norm and the very last layer."""
    shapes = skeletons.shapes_of(base, UNET)
    block, tensors = "middle_block.1.transformer_blocks.0.", {}
    for name in ("input_blocks.0.0", block + "attn1.to_q", "out.2"):
        tensors[f"diffusion_model.{name}.diff"] = _change(shapes[f"{name}.weight"])
    for name in ("input_blocks.0.0", block + "attn1.to_out.0", "out.2", block + "norm1"):
        tensors[f"diffusion_model.{name}.diff_b"] = _change(shapes[f"{name}.bias"])
    for name in (block + "attn1.to_v", "middle_block.0.in_layers.2"):
        tensors[f"diffusion_model.{name}.set_weight"] = _change(shapes[f"{name}.weight"])
    tensors[f"diffusion_model.{block}norm2.w_norm"] = _change(shapes[f"{block}norm2.weight"])
    tensors[f"diffusion_model.{block}norm2.b_norm"] = _change(shapes[f"{block}norm2.bias"])
    tensors[f"diffusion_model.{block}attn2.to_out.0.bias.diff"] = _change(shapes[f"{block}attn2.to_out.0.bias"])
    save_file(tensors, out)
    return len(tensors)


def _generic_text_encoder(base: Path, out: Path) -> int:
    """Keys by ComfyUI's own names: layers, norms, and the embeddings, one of which is read without calling it."""
    shapes = skeletons.shapes_of(base, CLIP)
    key, tensors = "text_encoders.clip_l.transformer.text_model.", {}
    layers = [f"encoder.layers.{n}.{name}" for n in (0, 5, 11) for name in ("self_attn.v_proj", "mlp.fc2")]
    for name in layers:
        tensors |= _lora(key + name, shapes[f"{name}.weight"])
    rows = shapes["embeddings.token_embedding.weight"]
    b, a = _pair(*rows)
    tensors[f"{key}embeddings.token_embedding.lora_up.weight"] = b * 0.1
    tensors[f"{key}embeddings.token_embedding.lora_down.weight"] = a
    name = "embeddings.position_embedding"
    tensors[f"{key}{name}.diff"] = _change(shapes[f"{name}.weight"])
    tensors[f"{key}final_layer_norm.w_norm"] = _change(shapes["final_layer_norm.weight"], 0.2)
    tensors[f"{key}final_layer_norm.b_norm"] = _change(shapes["final_layer_norm.bias"], 0.2)
    tensors[f"{key}encoder.layers.1.mlp.fc1.diff_b"] = _change(shapes["encoder.layers.1.mlp.fc1.bias"], 0.2)
    save_file(tensors, out)
    return len(layers) + 5


def _kohya_text_encoder(prefix: str, layers: int, base: Path, out: Path) -> int:
    """``lora_te_`` or ``lora_te1_`` keys with alpha."""
    tensors: Tensors = {}
    keys = [f"{prefix}_text_model_encoder_layers_{n}_self_attn_{x}_proj" for n in range(layers) for x in ("q", "out")]
    for key in keys:
        tensors |= _lora(key, (768, 768)) | {f"{key}.alpha": torch.tensor(3.0)}
    save_file(tensors, out)
    return len(keys)


def _slices(blocks: dict[str, str], base: Path, out: Path) -> int:
    """A difference, a replacement and a LoRA of rows of one weight; ``blocks``: path of q, k, v -> one turned layer."""
    tensors: Tensors = {}
    for path, turned in blocks.items():
        tensors[f"{path}.to_q.diff"] = _change((WIDTH, WIDTH))
        tensors[f"{path}.to_k.set_weight"] = _change((WIDTH, WIDTH))
        tensors |= _lora(f"{path}.to_v", (WIDTH, WIDTH), ".lora_B.weight", ".lora_A.weight")
        tensors |= _lora(turned, (2 * WIDTH, WIDTH), ".lora_B.weight", ".lora_A.weight")
    save_file(tensors, out)
    return 3 * len(blocks) + len(set(blocks.values()))


def _flux_slices(base: Path, out: Path) -> int:
    paths = ("transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.0.attn")
    return _slices(dict.fromkeys(paths, "transformer.norm_out.linear"), base, out)


def _sd3_slices(base: Path, out: Path) -> int:
    paths = (f"base_model.model.transformer_blocks.{n}.attn" for n in (0, 1))
    return _slices(dict.fromkeys(paths, "base_model.model.transformer_blocks.1.norm1_context.linear"), base, out)


def _difference_that_is_turned(base: Path, out: Path) -> int:
    """A difference whose rows ComfyUI swaps, as diffusers has scale and shift the other way round."""
    tensors = {"transformer.norm_out.linear.diff": _change((2 * WIDTH, WIDTH))}
    save_file(tensors, out)
    return len(tensors)


def _flux_onetrainer(base: Path, out: Path) -> int:
    tensors: Tensors = {}
    for name in ("transformer_blocks_0_attn_add_k_proj", "single_transformer_blocks_0_attn_to_k"):
        key = f"lora_transformer_{name}"
        tensors |= _lora(key, (WIDTH, WIDTH)) | {f"{key}.alpha": torch.tensor(2.0)}
    key = "lora_transformer_single_transformer_blocks_0_proj_mlp"
    tensors |= _lora(key, (4 * WIDTH, WIDTH)) | {f"{key}.dora_scale": 1 + 0.2 * torch.randn(4 * WIDTH, 1)}
    save_file(tensors, out)
    return 3


def _flux_fused_qkv_alone(base: Path, out: Path) -> int:
    """USO's: the q, k and v rows of a single block's first layer, which has the MLP's too."""
    tensors = _lora("diffusion_model.single_blocks.0.linear1_qkv", (3 * WIDTH, WIDTH))
    tensors |= _lora("diffusion_model.single_blocks.0.linear2", (WIDTH, 5 * WIDTH))
    save_file(tensors, out)
    return 2


def _flux_control(base: Path, out: Path) -> int:
    """Black Forest Labs' control LoRAs: an input layer twice as wide, biases, norms replaced."""
    shapes = skeletons.shapes_of(base)
    tensors = _lora("img_in", (WIDTH, 128), ".lora_B.weight", ".lora_A.weight")
    tensors["img_in.lora_B.bias"] = _change((WIDTH,))
    layers = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.linear")
    for name in layers:
        tensors |= _lora(name, shapes[f"{name}.weight"], ".lora_B.weight", ".lora_A.weight")
        tensors[f"{name}.lora_B.bias"] = _change(shapes[f"{name}.bias"])
    norms = [name for name in shapes if name.endswith("_norm.scale")]
    tensors |= {name: 1 + _change(shapes[name], 0.2) for name in norms}
    save_file(tensors, out)
    return 2 * (1 + len(layers)) + len(norms)


FILES = {
    "sd15-tiny": {
        "GLoRA in its old form": _old_glora,
        "LoRA, keys of attention processors": _attention_processors,
        "differences and replacements": _differences_and_replacements,
        "text encoder, generic keys": _generic_text_encoder,
        "text encoder, kohya keys": lambda base, out: _kohya_text_encoder("lora_te", 12, base, out),
    },
    "sd3-tiny": {
        "differences and replacements of slices": _sd3_slices,
        "text encoder, kohya keys": lambda base, out: _kohya_text_encoder("lora_te1", 12, base, out),
        "a difference that is turned": _difference_that_is_turned,
    },
    "flux-tiny": {
        "differences and replacements of slices": _flux_slices,
        "a difference that is turned": _difference_that_is_turned,
        "LoRA and DoRA, OneTrainer keys": _flux_onetrainer,
        "LoRA, fused q k v alone": _flux_fused_qkv_alone,
        "control LoRA that widens the input": _flux_control,
    },
}

"""LoRA files: from a safetensors file to the factors of each layer that it names. Knows names, no module.

Kohya's scripts, PEFT and diffusers name and store the same thing in their ways, and all are read:

    lora_unet_down_blocks_0_proj_in.lora_down.weight      kohya, LyCORIS; with .lora_up .lora_mid .alpha .dora_scale
    base_model.model.encoder.q_proj.lora_A.weight         PEFT; with .lora_B .lora_magnitude_vector; .lora_A.default
    unet.down_blocks.0.proj_in.lora.down.weight           diffusers; and .lora_A.weight, .lora_linear_layer.down
    unet.mid_block.attn1.processor.to_q_lora.down.weight  diffusers before 0.22
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lunashm.errors import InvalidLora, ModelNotFound, UnsupportedFormat, UnsupportedLora

SHOWN = 5
"""How many names a message lists."""

_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # PEFT puts the adapter's name there when a whole model is saved
_SUFFIXES = tuple(
    (re.compile(pattern), roles)
    for pattern, roles in (
        (rf"\.lora_(?P<role>A|B){_ADAPTER}(?:\.weight)?$", {"A": "down", "B": "up"}),
        (r"\.lora_(?P<role>down|up|mid)(?:\.weight)?$", {}),
        (r"\.lora(?:_linear_layer)?\.(?P<role>down|up)\.weight$", {}),
        (r"_lora\.(?P<role>down|up)\.weight$", {}),
        (rf"\.lora_embedding_(?P<role>A|B){_ADAPTER}$", {"A": "embedding down", "B": "embedding up"}),
        (rf"\.lora_(?P<role>magnitude)_vector{_ADAPTER}(?:\.weight)?$", {}),
        (r"\.(?P<role>dora_scale|alpha)$", {}),
    )
)
_OTHER_KINDS = {
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "OFT or BOFT": re.compile(r"\.b?oft_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "AdaLoRA": re.compile(r"\.lora_E(\.|$)"),
    "VeRA": re.compile(r"\.vera_"),
    "IA3": re.compile(r"\.ia3_|\.on_input$"),
    "norm difference": re.compile(r"\.[wb]_norm$"),
    "full difference": re.compile(r"\.diff(_b)?$|\.set_weight$"),
    "LoRA that reshapes the weight": re.compile(r"\.reshape_weight$"),
    "LoRA with a bias": re.compile(r"\.lora_(B|up)(\.[^.]+)?\.bias$"),
}
_WHOLE_WEIGHTS = {"layer that replaces the model's": re.compile(r"\.(weight|bias)$")}
_OLD_LAYERS = (
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"\.self_attn\.to_([qkv])$"), r".self_attn.\1_proj"),
    (re.compile(r"\.self_attn\.to_out$"), ".self_attn.out_proj"),
    (re.compile(r"\.to_out$"), ".to_out.0"),
)
"""What diffusers before 0.22 called a layer, and what its modules are called."""


@dataclass(frozen=True)
class Factors:
    """What a file holds for one layer: dW = scale * up @ down, and with a magnitude DoRA's.

    ``up`` (out, r, 1...), ``down`` (r, in, *kernel), ``mid`` (r, r, *kernel) between them in LoCon's CP form.
    ``magnitude`` as stored: (out,), (out, 1...) or (1, in, 1...). ``key`` is a key of the file that shows where it
    comes from; ``peft``, that its names are PEFT's.
    """

    key: str
    up: torch.Tensor
    down: torch.Tensor
    mid: torch.Tensor | None = None
    alpha: float | None = None
    magnitude: torch.Tensor | None = None
    peft: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.up, self.down, self.mid, self.magnitude) if t is not None)


@dataclass(frozen=True)
class LoraFile:
    """``layers`` by the name that the file gives each, prefixes included; ``unknown`` keys are nothing we know."""

    path: str
    layers: Mapping[str, Factors]
    unknown: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(factors.nbytes for factors in self.layers.values())


def read(path: str) -> LoraFile:
    """Read and check a whole file; its tensors are copies that no later write to the file reaches.

    Raises ModelNotFound, UnsupportedFormat (a pickle, say), InvalidLora, UnsupportedLora.
    """
    if Path(path).suffix.lower() not in (".safetensors", ".sft"):
        raise UnsupportedFormat(f"{path} is not a safetensors file; pickles are not opened, convert it first")
    try:
        # inference tensors, if that is the caller's mode, would be of no use outside it
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except OSError as exc:
        raise ModelNotFound(f"no LoRA at {path}: {exc.strerror or exc}") from exc
    except SafetensorError as exc:
        raise InvalidLora(f"{path} is damaged: {exc}") from exc
    return parse(path, tensors, metadata)


def parse(path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> LoraFile:
    """The factors in ``tensors``. Raises InvalidLora, UnsupportedLora."""
    found: dict[str, dict[str, str]] = {}  # layer -> role -> key
    unknown = []
    for key in tensors:
        layer, role = _split(key)
        if not role:
            unknown.append(key)
        elif role in found.setdefault(layer, {}):
            raise InvalidLora(f"{path}: {key} and {found[layer][role]} are the same factor of one layer")
        else:
            found[layer][role] = key
    _refuse(path, unknown, _OTHER_KINDS)
    for layer in [layer for layer, keys in found.items() if keys.keys() <= {"alpha"}]:
        unknown.append(found.pop(layer)["alpha"])
    if not found:
        raise InvalidLora(f"{path} holds no LoRA: none of its {len(tensors)} keys is one{listed(unknown, ' (', ')')}")
    _refuse(path, unknown, _WHOLE_WEIGHTS)
    _refuse_not_finite(path, {key: tensors[key] for keys in found.values() for key in keys.values()})
    layers = {layer: _factors(path, layer, keys, tensors) for layer, keys in found.items()}
    return LoraFile(path, layers, tuple(unknown), dict(metadata))


def listed(names: Iterable[str], before: str = "", after: str = "") -> str:
    """Up to SHOWN names and how many more; nothing at all for none."""
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{before}{', '.join(names[:SHOWN])}{more}{after}"


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, as float32 shows them."""
    return [name for name, tensor in tensors.items() if not bool(tensor.to(torch.float32).isfinite().all())]


def _split(key: str) -> tuple[str, str]:
    """Layer and role of a key; the role is empty for a key that is no part of a LoRA."""
    for pattern, roles in _SUFFIXES:
        match = pattern.search(key)
        if match is not None:
            layer = key[: match.start()]
            if key[match.start()] == "_":
                for old, new in _OLD_LAYERS:
                    layer = old.sub(new, layer)
            return layer, roles.get(match["role"], match["role"])
    return key, ""


def _refuse(path: str, keys: Iterable[str], kinds: Mapping[str, re.Pattern[str]]) -> None:
    for key in keys:
        for kind, pattern in kinds.items():
            if pattern.search(key):
                raise UnsupportedLora(f"{path} holds a {kind} ({key}), which has no low-rank form here; not applied")


def _refuse_not_finite(path: str, tensors: Mapping[str, torch.Tensor]) -> None:
    bad = not_finite(tensors)
    if bad:
        raise InvalidLora(f"{path}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity: {listed(bad)}")


def _factors(path: str, layer: str, keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Factors:
    embedding = not keys.keys().isdisjoint({"embedding down", "embedding up"})
    roles = ("embedding down", "embedding up") if embedding else ("down", "up")
    missing = [role for role in roles if role not in keys]
    if missing:
        raise InvalidLora(f"{path}: {layer} has no {' and no '.join(missing)} factor, only {listed(keys.values())}")
    key = keys[roles[0]]
    down, up = (tensors[keys[role]] for role in roles)
    mid = tensors[keys["mid"]] if "mid" in keys else None
    if not _fit(up, down, mid):
        shapes = " x ".join(str(list(t.shape)) for t in (up, mid, down) if t is not None)
        raise InvalidLora(f"{path}: the factors of {key} do not fit each other: {shapes}")
    if embedding:  # PEFT keeps those of the transposed weight: (r, tokens) and (width, r)
        down, up = up.t(), down.t()
    magnitude = tensors[keys["dora_scale"]] if "dora_scale" in keys else None
    if "magnitude" in keys:  # PEFT's is per output whatever its shape
        magnitude = tensors[keys["magnitude"]].flatten()
    alpha = _number(path, keys["alpha"], tensors) if "alpha" in keys else None
    return Factors(key, up, down, mid, alpha, magnitude, peft=embedding or ".lora_A" in key)


def _fit(up: torch.Tensor, down: torch.Tensor, mid: torch.Tensor | None) -> bool:
    """Whether the factors fit each other, up (out, r, 1...) and down (r, in, ...); the weight is another question."""
    if up.dim() < 2 or down.dim() < 2 or down.shape[0] == 0 or any(size != 1 for size in up.shape[2:]):
        return False
    if mid is None:
        return up.shape[1] == down.shape[0]
    pointwise = all(size == 1 for size in down.shape[2:])
    return mid.dim() > 2 and mid.shape[:2] == (up.shape[1], down.shape[0]) and pointwise


def _number(path: str, key: str, tensors: Mapping[str, torch.Tensor]) -> float:
    if tensors[key].numel() != 1:
        raise InvalidLora(f"{path}: {key} has shape {list(tensors[key].shape)}; it has to be one number")
    return float(tensors[key])

"""Runs inside ComfyUI's process: what LoRA files do to a shared model, beside what they do to stock's own copy.

One process an architecture, one JSON line a file, and a last one about the shared bytes. Judges nothing: the tests do.
Stock's copy is the same checkpoint loaded locally in float32, so its merged weights are W + dW, not rounded.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from comfy_ext.patcher import SharedModelPatcher, binding_of

STRENGTHS = (0.7, 0.6)
"""Model and text encoder. Not 1: some kinds are not proportional to it."""

Outputs = dict[str, torch.Tensor]


@dataclasses.dataclass
class Line:
    """What was seen of one file. Differences and changes are relative, in the Frobenius norm."""

    file: str
    patches: int = 0
    complaints: list[str] = dataclasses.field(default_factory=list)  # ComfyUI's warnings and errors
    worst_layer: float = float("inf")  # shared against stock, each layer on random inputs
    worst: str = ""
    end_to_end: float = float("inf")  # shared against stock, whole model
    least_change: float = 0.0  # of stock's layers by the file: what the differences are to be seen against
    restored: bool = False  # output without the file, after it, bit for bit as before it
    error: str = ""


@dataclasses.dataclass
class Pair:
    """A diffusion model and the text encoder that its checkpoint has, if it has one."""

    model: Any
    clip: Any

    def patched(self, files: list[str]) -> Pair:
        """With each file on top of the one before, as a chain of LoraLoader nodes does it."""
        model, clip = self.model, self.clip
        for file in files:
            tensors = comfy.utils.load_torch_file(file, safe_load=True)
            model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, *STRENGTHS)
        return Pair(model, clip)

    @property
    def patchers(self) -> list[Any]:
        return [self.model] if self.clip is None else [self.model, self.clip.patcher]

    @property
    def touched(self) -> list[tuple[int, str]]:
        """(index of the patcher, path of the module) for every module with a patched parameter."""
        paths = {(i, key.rpartition(".")[0]) for i, patcher in enumerate(self.patchers) for key in patcher.patches}
        return sorted(paths)

    def load(self) -> None:
        comfy.model_management.load_models_gpu(self.patchers)

    def layers(self, touched: list[tuple[int, str]]) -> Outputs:
        """What the touched modules make of random inputs. A bare parameter of a larger module has no output itself."""
        outputs = {}
        for index, path in touched:
            module = comfy.utils.get_attr(self.patchers[index].model, path)
            x = _random_input(module)
            if x is not None:
                outputs[f"{path} ({index})"] = module(x)
        return outputs

    def end_to_end(self, of: set[int]) -> Outputs:
        """What the model (0) and the text encoder (1) make of fixed inputs."""
        outputs = {}
        if 0 in of:
            outputs["model"] = _predict(self.model.model)
        if 1 in of and self.clip is not None:
            tokens = self.clip.tokenize("a lighthouse at dusk")
            outputs["cond"], outputs["pooled"] = self.clip.encode_from_tokens(tokens, return_pooled=True)
        return outputs


def _random_input(module: torch.nn.Module) -> torch.Tensor | None:
    random = torch.Generator().manual_seed(1)
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    if isinstance(module, torch.nn.Embedding):
        return torch.randint(weight.shape[0], (2, 7), generator=random)
    if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
        return torch.randn(2, weight.shape[1] if weight.dim() == 4 else weight.shape[0], 8, 8, generator=random)
    return torch.randn(2, 7, weight.shape[-1], generator=random)


def _predict(model: Any) -> torch.Tensor:
    """One pass of the diffusion model over fixed noise; a model whose input was widened gets a wider one."""
    config, network = model.model_config.unet_config, model.diffusion_model
    random = torch.Generator().manual_seed(2)
    channels = network.img_in.weight.shape[1] // 4 if hasattr(network, "img_in") else config["in_channels"]
    width = config.get("context_in_dim", config.get("context_dim", 4096))
    inputs: dict[str, Any] = {"context": torch.randn(2, 7, width, generator=random)}
    adm = config.get("vec_in_dim", config.get("adm_in_channels"))
    if adm is not None:
        inputs["y"] = torch.randn(2, adm, generator=random)
    if config.get("guidance_embed"):
        inputs["guidance"] = torch.tensor([3.5, 3.5])
    x = torch.randn(2, channels, 8, 8, generator=random)
    return network(x, torch.tensor([0.3, 0.8]) * (1 if hasattr(network, "img_in") else 999), **inputs)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Infinite for other shapes or numbers that are none."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


@contextmanager
def _complaints(line: Line) -> Iterator[None]:
    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "root":  # ComfyUI's own
                line.complaints.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _check(stock: Pair, shared: Pair, plain: Outputs, files: list[str], line: Line) -> None:
    """``plain``: what ``shared`` gave before any file was applied."""
    with _complaints(line):
        reference = stock.patched(files)
        touched = reference.touched
        parts = {index for index, _ in touched}
        stock.load()
        before = stock.layers(touched)
        reference.load()
        theirs, their_end = reference.layers(touched), reference.end_to_end(parts)

        patched = shared.patched(files)
        line.patches = sum(len(patches) for patcher in patched.patchers for patches in patcher.patches.values())
        patched.load()
        try:
            ours, our_end = patched.layers(touched), patched.end_to_end(parts)
        finally:
            shared.load()
    after = shared.end_to_end(parts)
    line.restored = bool(after) and all(torch.equal(after[name], plain[name]) for name in after)
    differences = {name: _difference(ours[name], theirs[name]) for name in theirs}
    line.worst = max(differences, key=lambda name: differences[name], default="")
    line.worst_layer = differences.get(line.worst, float("inf"))
    line.end_to_end = max((_difference(our_end[name], their_end[name]) for name in their_end), default=float("inf"))
    line.least_change = min((_difference(before[name], theirs[name]) for name in theirs), default=0.0)


def _load(path: str, mode: str) -> Pair:
    """``force_local`` is stock's own copy, in float32 throughout."""
    os.environ["LUNASHM_MODE"] = mode
    exact: dict[str, Any] = {"dtype": torch.float32} if mode == "force_local" else {}
    if "diffusion_models" in path:
        return Pair(comfy.sd.load_diffusion_model(path, model_options=dict(exact)), None)
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        path, output_vae=False, model_options=dict(exact), te_model_options=dict(exact)
    )
    return Pair(model, clip)


def _checksums(pair: Pair) -> list[str]:
    return [file.attachment.checksum() for patcher in pair.patchers for file in binding_of(patcher.model).files]


def _is_shared(pair: Pair) -> bool:
    return all(isinstance(patcher, SharedModelPatcher) for patcher in pair.patchers)


def main(checkpoint: str, stacks: dict[str, list[str]]) -> None:
    """``stacks``: a name -> the files to apply together."""
    with torch.inference_mode():
        stock, shared = _load(checkpoint, "force_local"), _load(checkpoint, "force_daemon")
        apart = _is_shared(shared) and not any(isinstance(p, SharedModelPatcher) for p in stock.patchers)
        before = _checksums(shared)
        shared.load()
        plain = shared.end_to_end({0, 1})
        for name, files in stacks.items():
            line = Line(name)
            try:
                _check(stock, shared, plain, files, line)
            except Exception:  # noqa: BLE001 - the other files are checked all the same
                line.error = traceback.format_exc()
            print(json.dumps(dataclasses.asdict(line)), flush=True)
        untouched = bool(before) and _checksums(shared) == before
        print(json.dumps({"file": "", "one is shared": apart, "shared bytes unchanged": untouched}), flush=True)

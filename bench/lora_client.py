"""One ComfyUI process that runs a diffusion model under stacks of LoRAs, in one way. Decides nothing: it is told.

It loads the model and the LoRA files once, then obeys commands that come as JSON lines and answers each with one line
(`bench.lora_processes` is the other end). A stack is a list of indices into the LoRA files; an empty one is no LoRA.

    ours     comfy.sd.load_lora_for_models, with the extension and a host
    merge    the same in stock ComfyUI, which merges the patches into the weights
    bypass   comfy.sd.load_bypass_lora_for_models in stock ComfyUI, every LoRA of the stack put in effect
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.process_memory import tree_memory
from bench.random_weights import Shape

WAYS = ("ours", "merge", "bypass")
STRENGTH = 0.8
SEED = 7
FLUX_TOKENS, CLIP_TOKENS = 256, 77

Stack = tuple[int, ...]


class Client:
    """The model, the LoRAs, and the patcher of every stack asked for so far."""

    def __init__(self, way: str, model: Path, loras: Sequence[Path], size: int, cpu: bool = True) -> None:
        """`size`: image side in pixels. ComfyUI must be importable; without `cpu` it chooses the GPU."""
        importlib.import_module("comfy.cli_args").args.cpu = cpu  # before anything asks for a device
        self._sd = importlib.import_module("comfy.sd")
        self._management = importlib.import_module("comfy.model_management")
        if way == "ours":
            importlib.import_module("comfy_ext")
        self._way, self._cpu = way, cpu
        self._base = self._load(model)
        load_file = importlib.import_module("comfy.utils").load_torch_file
        self._loras = [load_file(str(file), safe_load=True) for file in loras]
        self._patchers: dict[Stack, Any] = {(): self._base}
        self._current: Any = None
        device = self._management.get_torch_device()
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._inputs = {name: tensor.to(device) for name, tensor in fixed_inputs(self._base.model, size).items()}

    def _load(self, file: Path) -> Any:  # noqa: ANN401 - ComfyUI has no types
        if file.parent.name == "diffusion_models":
            return self._sd.load_diffusion_model(str(file))
        return self._sd.load_checkpoint_guess_config(str(file), output_vae=False, output_clip=False)[0]

    def _patcher(self, stack: Stack) -> Any:  # noqa: ANN401
        if stack not in self._patchers:
            patcher = self._base
            for index in stack:
                patcher = self._with_lora(patcher, index)
            if self._way == "bypass":
                patcher = self._bypassed(stack)
            self._patchers[stack] = patcher
        return self._patchers[stack]

    def _with_lora(self, patcher: Any, index: int) -> Any:  # noqa: ANN401
        way = "load_bypass_lora_for_models" if self._way == "bypass" else "load_lora_for_models"
        return getattr(self._sd, way)(patcher, None, self._loras[index], STRENGTH, 0.0)[0]

    def _bypassed(self, stack: Stack) -> Any:  # noqa: ANN401
        """A patcher with the bypass of every LoRA of the stack: chained by its loader, the last one alone would stay.

        Ejected in reverse, as each puts back the forward it found.
        """
        chain = [i for index in stack for i in self._with_lora(self._base, index).get_injections("bypass_lora")]
        injection = importlib.import_module("comfy.patcher_extension").PatcherInjection(
            inject=lambda patcher: [one.inject(patcher) for one in chain],
            eject=lambda patcher: [one.eject(patcher) for one in reversed(chain)],
        )
        patcher = self._base.clone()
        patcher.set_injections("bypass_lora", [injection])
        return patcher

    # -- commands: what each answers is a JSON value ---------------------------------------------------------------

    def load(self, stack: Sequence[int]) -> float:
        """Seconds that ComfyUI takes to make the model ready to run with `stack`."""
        patcher = self._patcher(tuple(stack))
        gc.collect()
        began = time.perf_counter()
        self._management.load_models_gpu([patcher])
        self._wait()
        took_s = time.perf_counter() - began
        self._current = patcher
        return took_s

    def step(self, count: int = 1) -> float:
        """Seconds of one forward of the diffusion model; the mean of `count`, one after the other."""
        began = time.perf_counter()
        for _ in range(count):
            self._forward()
        self._wait()
        return (time.perf_counter() - began) / count

    def output(self) -> list[float]:
        return list(self._forward().flatten().tolist())

    def chained(self, stack: Sequence[int]) -> list[float]:
        """The output of `stack` as the bypass loader chains it; leaves that loaded."""
        patcher = self._base
        for index in stack:
            patcher = self._with_lora(patcher, index)
        self._management.load_models_gpu([patcher])
        return self.output()

    def flops(self) -> float:
        """Operations of one forward as it runs now: matrix products, convolutions and attention."""
        in_place = {torch.ops.aten.addmm_: _product_flops}  # torch 2.11 counts addmm, and not this
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            self._forward()
        return float(counter.get_total_flops())

    def layers(self, stack: Sequence[int]) -> list[tuple[int, int, int]]:
        """(tokens, out, in) of every call, in one forward, of every layer that `stack` patches; not for bypass."""
        calls: list[tuple[int, int, int]] = []

        def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows, columns = module.weight.shape
            calls.append((args[0].numel() // columns, rows, columns))

        with contextlib.ExitStack() as hooks:
            for key in self._patcher(tuple(stack)).patches:
                module = self._base.model.get_submodule(key.removesuffix(".weight"))
                hooks.callback(module.register_forward_pre_hook(count).remove)
            self._forward()
        return calls

    def factor_nbytes(self, stack: Sequence[int]) -> int:
        """Bytes of the factors of `stack` in the dtype that the model computes in."""
        itemsize = self._base.model.get_dtype().itemsize
        factors = (tensor for index in stack for name, tensor in self._loras[index].items() if ".lora_" in name)
        return sum(tensor.numel() for tensor in factors) * itemsize

    def private_nbytes(self) -> int:
        """Pages that this process alone holds, after giving back what is free; on a GPU its tensors' bytes there."""
        gc.collect()
        if torch.cuda.is_available() and not self._cpu:
            return int(torch.cuda.memory_allocated())
        ctypes.CDLL(None).malloc_trim(0)
        return tree_memory(os.getpid())["private"]

    def counted_nbytes(self) -> int:
        """What ComfyUI's patcher says that the model holds."""
        return int(self._current.model_size())

    def _forward(self) -> torch.Tensor:
        result: torch.Tensor = self._base.model.apply_model(**self._inputs)
        return result


def _product_flops(_: Shape, a: Shape, b: Shape, out_shape: Shape | None = None, **kwargs: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def fixed_inputs(model: Any, size: int) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Two latents (a prompt and its negative) with random conditioning of the widths that the model wants."""
    generator = torch.Generator().manual_seed(SEED)
    config = model.model_config.unet_config
    channels, side = model.latent_format.latent_channels, size // 8

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    inputs = {"x": random(channels, side, side), "t": torch.tensor([0.6, 0.6])}
    if "context_in_dim" in config:  # Flux
        context = {"c_crossattn": random(FLUX_TOKENS, config["context_in_dim"]), "y": random(config["vec_in_dim"])}
        return inputs | context | {"guidance": torch.tensor([3.5, 3.5])}
    if "context_embedder_config" in config:  # SD3
        width = config["context_embedder_config"]["params"]["in_features"]
        return inputs | {"c_crossattn": random(CLIP_TOKENS, width), "y": random(config["adm_in_channels"])}
    vector = {"y": random(config["adm_in_channels"])} if config.get("adm_in_channels") else {}  # SDXL
    context = {"c_crossattn": random(CLIP_TOKENS, config["context_dim"])}
    return inputs | vector | context | {"t": torch.tensor([500.0, 500.0])}


def main() -> None:
    """Serve commands, `{"do": NAME, ...arguments}`, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints goes to the log
    arguments = json.loads(sys.argv[1])
    with torch.inference_mode():  # as ComfyUI runs its nodes
        client = Client(
            arguments["way"], Path(arguments["model"]), [Path(p) for p in arguments["loras"]], arguments["size"],
            arguments["cpu"],
        )  # fmt: skip
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(client, command.pop("do"))(**command)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

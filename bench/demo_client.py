"""One client of the demo: gets a UNet's weights, shared or private, and denoises with them and a LoRA of its own.

This is all that a program needs to share its weights; nothing in it knows ComfyUI. It prints one JSON line when its
steps are done, then keeps its model until stdin closes, so that it can be measured beside the others.

    python -m bench.demo_client shared MODEL --lora FILE --endpoint ipc:///run/user/1000/lunashm/cpu.sock
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from bench.demo_model import config_of
from lunashm.client import Attachment, attach
from lunashm.client.lora import apply_lora
from lunashm.errors import LunashmError

GUIDANCE = 5.0
TOKENS = 77


def empty_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config).eval().requires_grad_(False)


def shared_unet(model: Attachment) -> UNet2DConditionModel:
    """Its parameters are the host's bytes."""
    unet = empty_unet(config_of(model.metadata))
    model.load_into(unet)
    return unet


def private_unet(path: str) -> UNet2DConditionModel:
    """The ordinary way, as stock ComfyUI does it: memory of its own, and the file's values copied into it."""
    with safe_open(path, framework="pt") as file:
        config = config_of(file.metadata())
    unet = empty_unet(config).to_empty(device="cpu")
    unet.load_state_dict(load_file(path))
    return unet


def check_whole(unet: UNet2DConditionModel) -> None:
    """A buffer that is in no state dict would still be without memory here: its values were never computed."""
    tensors = itertools.chain(unet.named_parameters(), unet.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise SystemExit(f"not in the checkpoint, and without values: {', '.join(missing)}")


@torch.inference_mode()
def denoise(unet: UNet2DConditionModel, seed: int, steps: int) -> torch.Tensor:
    """Euler with classifier-free guidance from random latents and a random prompt, both made from ``seed``.

    Returns latents, (1, channels, size, size).
    """
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    noise = torch.Generator().manual_seed(seed)
    size, channels = unet.config["sample_size"], unet.config["in_channels"]
    latents = torch.randn(1, channels, size, size, generator=noise) * scheduler.init_noise_sigma
    prompt = torch.randn(2, TOKENS, unet.config["cross_attention_dim"], generator=noise)  # without, with
    for step in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents] * 2), step)
        without, wanted = unet(both, step, encoder_hidden_states=prompt).sample.chunk(2)
        latents = scheduler.step(without + GUIDANCE * (wanted - without), step, latents).prev_sample
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_client")
    parser.add_argument("way", choices=["shared", "private"])
    parser.add_argument("model")
    parser.add_argument("--endpoint", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lora", default="", help="a LoRA for this client alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # sums are split by thread: equal outputs need an equal number
    with contextlib.ExitStack() as stack:
        try:
            unet, result = _run(stack, args)
        except LunashmError as exc:
            sys.exit(exc.message)
        print(json.dumps(result), flush=True)
        sys.stdin.read()
        del unet


def _run(stack: contextlib.ExitStack, args: argparse.Namespace) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Load, apply the LoRA, denoise. ``stack`` holds attachment and LoRA; ``sums`` are of the shared bytes, before
    and after."""
    began = time.monotonic()
    model = None
    if args.way == "shared":
        label = Path(args.lora).stem or f"seed {args.seed}"
        model = stack.enter_context(attach(args.model, endpoint=args.endpoint, kind="diffusers", label=label))
    unet = private_unet(args.model) if model is None else shared_unet(model)
    check_whole(unet)
    loaded = time.monotonic()
    sums = [] if model is None else [model.checksum()]
    if args.lora:
        stack.enter_context(apply_lora([unet], args.lora) if model is None else model.apply_lora(args.lora))
    begun = time.monotonic()
    latents = denoise(unet, args.seed, args.steps)
    return unet, {
        "seed": args.seed,
        "load_s": loaded - began,
        "steps_s": time.monotonic() - begun,
        "sha256": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
        "finite": bool(latents.isfinite().all()),
        "std": float(latents.std()),
        "sums": sums if model is None else [*sums, model.checksum()],
    }


if __name__ == "__main__":
    main()

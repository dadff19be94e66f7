"""The main job in two minutes: four processes denoise with one copy of a model's weights, then with four.

Each has a LoRA of its own, on weights that it cannot write.

Needs no ComfyUI and no download: the model has random weights and is as large as this machine can show. Where
$LUNASHM_COMFYUI or ~/ComfyUI is a ComfyUI checkout, real ComfyUI servers do the same afterwards.

    python -m bench.demo        # or: make demo
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bench import demo_comfy, demo_lora, demo_report
from bench.demo_model import PRESETS, DemoError, Preset, by_name, choose
from bench.demo_processes import CLIENT_S, Child, clients, host, run
from bench.demo_report import Comparison, Memory
from bench.memory_watch import settled
from bench.process_memory import tree_memory
from lunashm.memory import ram
from lunashm.memory.posix import PosixRung

SMALL_SHM = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=4, choices=range(1, 17), metavar="N")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of each client")
    parser.add_argument("--preset", choices=[p.name for p in PRESETS], help="model size (default: what fits)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where picture and JSON go")
    parser.add_argument(
        "--full", action="store_true", help="a whole SD1.5 in ComfyUI, where about 14 GB of RAM are free"
    )
    parser.add_argument("--no-comfy", action="store_true", help="leave ComfyUI out")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # as Ctrl-C: everything that was started is ended
    try:
        _demo(args, Console())
    except DemoError as exc:
        sys.exit(f"demo: {exc}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything it started is ended")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _demo(args: argparse.Namespace, console: Console) -> None:
    _check_packages()
    with contextlib.ExitStack() as stack:
        folder = _folder(stack)
        preset = _preset(args, folder, console)
        comfy = None if args.no_comfy else demo_comfy.checkout()
        comparisons = [_diffusers(preset, folder, args.clients, args.steps, console)]
        _show(comparisons, comfy, args.out, console)
        if comfy is not None:
            more = _comfy(comfy, folder, args.full, console)
            comparisons += more
            if more:
                _show(comparisons, comfy, args.out, console)
        elif not args.no_comfy:
            _say(console, "No ComfyUI checkout found ($LUNASHM_COMFYUI or ~/ComfyUI): its part is left out.")
    faults = [fault for comparison in comparisons for fault in comparison.faults]
    if faults:
        raise DemoError(f"{'; '.join(faults)}; that must never be")


def _show(comparisons: Sequence[Comparison], comfy: Path | None, out: Path, console: Console) -> None:
    """The newest comparison as a table, all of them in the files."""
    demo_report.print_table(comparisons[-1], console)
    out.mkdir(parents=True, exist_ok=True)
    demo_report.draw(comparisons, out / "memory.png")
    demo_report.write(comparisons, out / "demo.json", comfy)
    _say(console, f"\nWrote {out / 'memory.png'} and {out / 'demo.json'}.")


def _comfy(comfy: Path, folder: Path, full: bool, console: Console) -> list[Comparison]:
    """At most one: nothing where it does not fit."""
    _say(console, f"\nThe same with real ComfyUI servers from {comfy}:")
    for wanted in demo_comfy.plans(full):
        obstacle = wanted.obstacle()
        if obstacle:
            _say(console, f"{wanted.arch} is left out: {obstacle}.")
            continue
        with console.status(f"ComfyUI servers render {wanted.arch}, stock and shared"):
            found = demo_comfy.compare(comfy, folder, wanted)
        _tell(found, "images of 2 steps", "byte-identical", console)
        if not full:
            _say(console, "The checkpoint is small beside ComfyUI itself; --full renders with a whole SD1.5, 4.3 GB.")
        return [found]
    return []


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _check_packages() -> None:
    missing = [name for name in ("torch", "diffusers", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"{', '.join(missing)} not installed; run: python -m pip install -e '.[demo]' (or: make demo)")


def _folder(stack: contextlib.ExitStack) -> Path:
    """A temporary directory, removed whatever happens; its path is short enough for a socket in it."""
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="lunashm-demo-", dir=parent if len(parent) < 60 else "/tmp"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _preset(args: argparse.Namespace, folder: Path, console: Console) -> Preset:
    """The model's size, and a word on why."""
    rung = PosixRung()
    free_shm, free_ram, free_disk = rung.free_nbytes(), ram.available(), shutil.disk_usage(folder).free
    preset = by_name(args.preset) if args.preset else choose(free_shm, free_ram, free_disk, args.clients)
    _say(console, f"Free: {free_ram / 1e9:.1f} GB of RAM, {free_shm / 1e9:.2f} GB for shared memory.")
    _say(console, f"Model: {preset.name}, {preset.nbytes / 1e6:,.0f} MB of random weights in float32.")
    if rung.total_nbytes() < SMALL_SHM and preset is not PRESETS[0]:
        size = f"{rung.total_nbytes() / 1e6:.0f} MB"
        _say(console, f"/dev/shm has only {size}, a container's default, so the model is small and saves little.")
        _say(console, "For real models give the container more: docker run --shm-size 16g")
    return preset


def _diffusers(preset: Preset, folder: Path, number: int, steps: int, console: Console) -> Comparison:
    """The same clients on one copy of the weights and on a copy each. One seed for all: what differs is the LoRA."""
    models = folder / "models"
    models.mkdir()
    model = models / f"unet-{preset.name}.safetensors"
    with console.status("making a diffusion model with random weights"):
        run(["bench.demo_model", preset.name, str(model)], folder, "making the model")
        run(["bench.demo_lora", str(model), str(folder / "loras"), str(number)], folder, "making the LoRAs")
    threads = max(1, len(os.sched_getaffinity(0)) // number)
    common = [str(model), "--seed", "1", "--steps", str(steps), "--threads", str(threads)]
    flags = [[*common, "--lora", str(demo_lora.path_of(folder / "loras", own))] for own in range(number)]

    with host(folder, models) as (server, url):
        ways = [["shared", *own, "--endpoint", url] for own in flags]
        with clients(ways, folder, "sharing") as children:
            with console.status(f"{number} clients denoise on one copy of the weights"):
                shared = _wait(children)
            shared_memory = _measure(children, server)
            _say(console, "\n$ lunashm ps")
            listing = run(["lunashm", "ps", "--endpoint", url], folder, "lunashm ps", timeout_s=60.0)
            _say(console, listing)
    with clients([["private", *own] for own in flags], folder, "private") as children:
        with console.status(f"{number} clients denoise on a copy each"):
            private = _wait(children)
        private_memory = _measure(children)

    pairs = list(zip(shared, private, strict=True))
    found = Comparison(
        title=f"{number} diffusers processes, one {preset.nbytes / 1e6:,.0f} MB model",
        model_nbytes=preset.nbytes,
        private=private_memory,
        shared=shared_memory,
        load_s={"private": [r["load_s"] for r in private], "shared": [r["load_s"] for r in shared]},
        identical=sum(a["sha256"] == b["sha256"] and bool(a["finite"]) for a, b in pairs),
        outputs=number,
        loras=[demo_lora.style_of(own) for own in range(number)],
        distinct=len({r["sha256"] for r in shared}),
        checksums=[checksum for r in shared for checksum in r["sums"]],
    )
    _tell(found, f"latents after {steps} steps", "bit-identical", console)
    _tell_loras(found, console)
    return found


def _wait(children: Sequence[Child]) -> list[dict[str, Any]]:
    return [child.line(CLIENT_S) for child in children]


def _measure(children: Sequence[Child], server: Child | None = None) -> list[Memory]:
    """Each client's and, last, the host's, with such of its shared memory as no client has touched."""
    found = settled([child.pid for child in children], server.pid if server else None)
    sizes = enumerate(zip(found.servers, found.private, strict=True), 1)
    memories = [Memory(f"client {number}", pss, uss) for number, (pss, uss) in sizes]
    if server is not None:
        memories.append(Memory("host", found.host + found.unmapped, tree_memory(server.pid)["private"]))
    return memories


def _tell(found: Comparison, outputs: str, word: str, console: Console) -> None:
    if found.identical == found.outputs:
        _say(console, f"All {found.outputs} {outputs}: {word} with shared and with private weights.")
    else:
        _say(console, f"{found.outputs - found.identical} OF {found.outputs} {outputs.upper()} DIFFER")


def _tell_loras(found: Comparison, console: Console) -> None:
    _say(console, "Each client had a LoRA of its own on the same seed, on shared weights as on private ones:")
    different = "all different" if found.distinct == found.outputs else f"ONLY {found.distinct} DIFFERENT"
    bytes_ = "unchanged" if found.untouched else "CHANGED"
    _say(console, f"{found.outputs} latents, {different}; the shared bytes are {bytes_} (BLAKE3, before and after).")


if __name__ == "__main__":
    main()

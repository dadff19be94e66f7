"""The main job in two minutes: four processes denoise with one copy of a model's weights, then with four.

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

from rich.console import Console

from bench import demo_comfy, demo_report
from bench.demo_model import PRESETS, DemoError, Preset, by_name, choose
from bench.demo_processes import CLIENT_S, Child, clients, host, run
from bench.demo_report import Comparison, Memory
from bench.process_memory import tree_memory
from lunashm.memory import ram
from lunashm.memory.posix import PosixRung

SMALL_SHM = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=4, choices=range(1, 17), metavar="N")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of each client")
    parser.add_argument("--preset", choices=[p.name for p in PRESETS], help="model size (default: what fits)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where picture and JSON go")
    parser.add_argument("--full", action="store_true", help="a whole SD1.5 in ComfyUI, where 16 GB of RAM are free")
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
        comparisons = [_diffusers(preset, folder, args.clients, args.steps, console)]
        demo_report.print_table(comparisons[0], console)
        comfy = None if args.no_comfy else demo_comfy.checkout()
        if comfy is not None:
            comparisons.append(demo_comfy.compare(comfy, folder, args.full, console))
            demo_report.print_table(comparisons[1], console)
        elif not args.no_comfy:
            console.print("No ComfyUI checkout found ($LUNASHM_COMFYUI or ~/ComfyUI): its part is left out.")
    args.out.mkdir(parents=True, exist_ok=True)
    demo_report.draw(comparisons, args.out / "memory.png")
    demo_report.write(comparisons, args.out / "demo.json", comfy)
    console.print(f"\nWrote {args.out / 'memory.png'} and {args.out / 'demo.json'}.", highlight=False)
    if any(comparison.identical != comparison.outputs for comparison in comparisons):
        raise DemoError("outputs differ between shared and private weights; that must never be")


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
    console.print(
        f"Free: {free_ram / 1e9:.1f} GB of RAM, {free_shm / 1e9:.2f} GB for shared memory. "
        f"Model: {preset.name}, {preset.nbytes / 1e6:,.0f} MB of weights.", highlight=False,
    )  # fmt: skip
    if rung.total_nbytes() < SMALL_SHM and preset is not PRESETS[0]:
        console.print(
            f"/dev/shm has only {rung.total_nbytes() / 1e6:.0f} MB, as containers do by default, so the model is small. "
            "For real models: docker run --shm-size 16g", highlight=False,
        )  # fmt: skip
    return preset


def _diffusers(preset: Preset, folder: Path, number: int, steps: int, console: Console) -> Comparison:
    """The same clients with the same seeds, on one copy of the weights and on a copy each."""
    models = folder / "models"
    models.mkdir()
    model = models / f"unet-{preset.name}.safetensors"
    with console.status("making a diffusion model with random weights"):
        run(["bench.demo_model", preset.name, str(model)], folder, "making the model")
    threads = max(1, len(os.sched_getaffinity(0)) // number)
    flags = [[str(model), "--seed", str(s), "--steps", str(steps), "--threads", str(threads)] for s in range(number)]

    with host(folder, models) as (server, url):
        ways = [["shared", *own, "--endpoint", url] for own in flags]
        with clients(ways, folder, "sharing") as children:
            with console.status(f"{number} clients denoise on one copy of the weights"):
                shared = _wait(children)
            shared_memory = [*_measure(children), _memory("host", server.pid)]
            console.print("\n[bold]$ lunashm ps[/]")
            listing = run(["lunashm", "ps", "--endpoint", url], folder, "lunashm ps", timeout_s=60.0)
            console.print(listing.rstrip(), markup=False, highlight=False, soft_wrap=True)
    with clients([["private", *own] for own in flags], folder, "private") as children:
        with console.status(f"{number} clients denoise on a copy each"):
            private = _wait(children)
        private_memory = _measure(children)

    pairs = zip(shared, private, strict=True)
    identical = sum(a["sha256"] == b["sha256"] and bool(a["finite"]) for a, b in pairs)
    _tell(identical, number, steps, console)
    return Comparison(
        title=f"{number} diffusers processes, one {preset.nbytes / 1e6:,.0f} MB model",
        model_nbytes=preset.nbytes,
        private=private_memory,
        shared=shared_memory,
        load_s={"private": [r["load_s"] for r in private], "shared": [r["load_s"] for r in shared]},
        identical=identical,
        outputs=number,
    )


def _wait(children: Sequence[Child]) -> list[dict[str, float | str]]:
    return [child.line(CLIENT_S) for child in children]


def _measure(children: Sequence[Child]) -> list[Memory]:
    return [_memory(f"client {number}", child.pid) for number, child in enumerate(children, 1)]


def _memory(name: str, pid: int) -> Memory:
    fields = tree_memory(pid)
    return Memory(name, fields["pss"], fields["private"])


def _tell(identical: int, number: int, steps: int, console: Console) -> None:
    if identical == number:
        console.print(f"Outputs of all {number} seeds after {steps} steps: bit-identical with shared and private weights.")
    else:
        console.print(f"[bold red]Outputs of {number - identical} of {number} seeds differ.[/]")


if __name__ == "__main__":
    main()

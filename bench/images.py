"""Whether attached servers render what stock ComfyUI renders, to the byte.

For each architecture one workflow, the same prompt and seed, on one stock server and on one server attached to a host;
the whole PNG files are compared.

    python -m bench.images --archs sd15,sd15-tiny,sd3-tiny,flux-tiny
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import checkpoints
from bench.comfy_server import ComfyServer
from bench.host import HostProcess
from bench.report import Figure, Report, add_arguments, emit
from bench.workflows import Graph, flux_unet, txt2img_checkpoint
from bench.workload import made

# arch -> the files it needs (folder, arch, dtype), and its graph from their names
Recipe = tuple[tuple[tuple[str, str, str], ...], Callable[..., Graph]]
RECIPES: dict[str, Recipe] = {
    "sd15": ((("checkpoints", "sd15", "fp32"),), txt2img_checkpoint),
    "sd15-tiny": ((("checkpoints", "sd15-tiny", "fp16"),), txt2img_checkpoint),
    "sd3-tiny": ((("checkpoints", "sd3-tiny", "fp16"),), lambda name: txt2img_checkpoint(name, sd3=True)),
    "flux-tiny": (
        (
            ("diffusion_models", "flux-tiny", "fp16"),
            ("text_encoders", "clip-l", "fp16"),
            ("vae", "vae-tiny", "fp16"),
        ),
        flux_unet,
    ),
}


def render(archs: list[str], models: Path, graphs: dict[str, Graph], host: HostProcess | None) -> dict[str, bytes]:
    """Each architecture's image from one server; an attached one that cannot attach fails."""
    nodes = {"lunashm": checkpoints.ROOT / "comfy_ext"} if host else {}
    with ComfyServer(
        models=[models], custom_nodes=nodes, environment=host.environment if host else {}
    ) as server:  # fmt: skip
        return {arch: server.render(graphs[arch]) for arch in archs}


def run(archs: list[str], comfy: Path) -> dict[str, bool]:
    """By architecture, whether both images are the same file."""
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lunashm-models-")))
        roots, graphs = set(), {}
        for arch in archs:
            needs, graph = RECIPES[arch]
            files = [made(kind, dtype, comfy, folder) for folder, kind, dtype in needs]
            for (folder, _, _), file in zip(needs, files, strict=True):
                (models / folder).mkdir(exist_ok=True)
                (models / folder / file.name).symlink_to(file.resolve())
                roots.add(file.resolve().parent)
            graphs[arch] = graph(*(file.name for file in files))
        stock = render(archs, models, graphs, None)
        host = stack.enter_context(HostProcess(roots=sorted(roots)))
        shared = render(archs, models, graphs, host)
        return {arch: stock[arch] == shared[arch] for arch in archs}


def _archs(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(RECIPES)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(RECIPES)}")
    return names


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=about)
    parser.add_argument("--archs", type=_archs, default=list(RECIPES), metavar="ARCH,ARCH", help="default: all")
    parser.add_argument("--comfy", help="ComfyUI checkout (default: $LUNASHM_COMFYUI, else ~/ComfyUI)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    comfy = checkpoints.comfy_root(args.comfy)
    os.environ["LUNASHM_COMFYUI"] = str(comfy)  # for the servers
    same = run(args.archs, comfy)
    figures = [Figure(f"{arch}: image byte-identical to stock's", float(same[arch]), "share", ">= 1") for arch in same]
    samples = {arch: [float(value)] for arch, value in same.items()}
    report = Report.of("images", figures, samples, comfy=comfy)
    return 0 if emit(report, args.json, args.save, draw=lambda _report, _out: None) else 1  # nothing to draw


if __name__ == "__main__":
    sys.exit(main())

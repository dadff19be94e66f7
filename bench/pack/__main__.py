"""Writes what the node pack has beside its code, from the nodes as a ComfyUI server shows them.

    python -m bench.pack               # locales/en and example_workflows/*.json in comfy_ext
    python -m bench.pack --pictures    # and the pictures of the workflows, which needs Chromium and Playwright

To be run when inputs, outputs or their texts change; tests/comfy/test_example_workflows.py and
tests/comfy/test_node_texts.py say when that was forgotten.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.comfy_server import ComfyServer
from bench.pack import api, examples, locales, pictures
from bench.pack.definitions import definitions
from bench.root import ROOT

PACK = ROOT / "comfy_ext"
MODULE = "custom_nodes.lunashm"
FILES = {"checkpoints": (examples.MODEL, examples.REFINER), "loras": (examples.CHARACTER, examples.STYLE)}


def written(value: object) -> str:
    """JSON as it is kept in the repository."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", action="store_true", help="also make the pictures of the workflows")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as server:
        known = definitions(json.loads(server.request("/object_info")))
        if not any(definition.pack == MODULE for definition in known.values()):
            raise server.failure("did not load the pack")
        _write(PACK / "locales" / "en" / "nodeDefs.json", written(locales.node_definitions(known, MODULE)))
        _write(PACK / "locales" / "en" / "main.json", written(locales.main()))
        saved = examples.saved(known)
        for name, workflow in saved.items():
            _write(PACK / "example_workflows" / f"{name}.json", written(workflow))
        if args.pictures:
            with pictures.front_end(server.port) as page:
                for name, workflow in saved.items():
                    page.load(workflow, api.prompt(workflow, known))
                    _write(PACK / "example_workflows" / f"{name}.jpg", page.picture())
    return 0


def _server(folder: Path) -> ComfyServer:
    """With files of the names that the workflows choose; nothing is loaded from them."""
    for kind, names in FILES.items():
        (folder / "models" / kind).mkdir(parents=True)
        for name in names:
            (folder / "models" / kind / name).touch()
    (folder / "run").mkdir()
    return ComfyServer(
        models=[folder / "models"], custom_nodes={"lunashm": PACK},
        environment={"LUNASHM_RUNTIME_DIR": str(folder / "run")},
    )  # fmt: skip


def _write(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)
        print(f"wrote {path.relative_to(ROOT)} ({len(data)} bytes)")


if __name__ == "__main__":
    sys.exit(main())

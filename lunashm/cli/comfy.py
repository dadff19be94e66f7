"""``lunashm comfy``: put the extension into a ComfyUI checkout, and take it out again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lunashm import __version__, settings
from lunashm.cli.checkout import MARKER, Checkout, Presence, extension, outermost, requirement
from lunashm.cli.exits import Refused
from lunashm.cli.output import AsJson, Output
from lunashm.cli.serve import existing_roots
from lunashm.errors import LunashmError, ModelNotFound

app = typer.Typer(help="Install the extension into ComfyUI.", no_args_is_help=True)

ComfyPath = Annotated[str, typer.Argument(metavar="PATH", help="The ComfyUI checkout: the folder with main.py.")]


@app.command()
def install(
    path: ComfyPath,
    copy: Annotated[bool, typer.Option("--copy", help="Copy it, for file systems without symbolic links.")] = False,
    as_json: AsJson = False,
) -> None:
    """Link the extension into PATH/custom_nodes/lunashm. Safe to repeat."""
    checkout = Checkout.at(path)
    source = extension()
    changed = _copy(checkout, source) if copy else _link(checkout, source)
    missing = roots_missing(checkout)
    value = {
        "path": checkout.node, "target": source, "how": "copy" if copy else "link", "changed": changed,
        "pip": pip_command(checkout), "model_folders": checkout.model_folders(), "roots_missing": missing,
        "serve": serve_command(checkout) if missing else "lunashm serve",
    }  # fmt: skip
    done = ("copied to " if copy else "linked as ") if changed else "is already there: "
    Output(as_json).result(_plain(value), f"extension {done}{checkout.node}", *_next_steps(checkout, missing))


@app.command()
def uninstall(path: ComfyPath, as_json: AsJson = False) -> None:
    """Remove the extension from PATH/custom_nodes; nothing else there is touched."""
    checkout = Checkout.at(path)
    presence = checkout.presence
    if presence is Presence.ABSENT:
        raise ModelNotFound(f"{checkout.node} does not exist; there is nothing to remove")
    _remove(checkout)
    Output(as_json).result({"path": str(checkout.node), "was": presence.value}, f"removed {checkout.node}")


def _link(checkout: Checkout, source: Path) -> bool:
    """Whether anything had to change."""
    if checkout.presence is Presence.LINK and checkout.node.resolve() == source:
        return False
    _remove(checkout)
    try:
        checkout.node.symlink_to(source, target_is_directory=True)
    except OSError as exc:
        raise LunashmError(f"cannot link {checkout.node}: {exc.strerror}; try: lunashm comfy install --copy") from exc
    return True


def _copy(checkout: Checkout, source: Path) -> bool:
    # ComfyUI loads no folder whose name ends in .disabled, so it never sees half of an extension
    fresh = checkout.node.with_name(f"{checkout.node.name}.new.disabled")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("__pycache__"))
    (fresh / MARKER).write_text(json.dumps({"version": __version__, "source": str(source)}))
    try:
        _remove(checkout)
        fresh.rename(checkout.node)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return True


def _remove(checkout: Checkout) -> None:
    """Take away what lunashm put there. Raises Refused for anything else."""
    match checkout.presence:
        case Presence.LINK:
            checkout.node.unlink()
        case Presence.COPY:
            shutil.rmtree(checkout.node)
        case Presence.PACK:
            raise Refused(
                f"{checkout.node} is lunashm's, but not put there by `lunashm comfy install`; update or remove it with "
                "what did, ComfyUI-Manager say"
            )
        case Presence.FOREIGN:
            raise Refused(f"{checkout.node} was not put there by lunashm; move it away, then try again")


# -- what the user has to do next --------------------------------------------------------------------------------------


def roots_missing(checkout: Checkout, roots: Sequence[str] | None = None) -> list[Path]:
    """Model folders outside ``roots``; without those, outside the configured or default ones."""
    allowed = existing_roots(settings.load().roots) if roots is None else roots
    real = [Path(os.path.realpath(root)) for root in allowed]
    return [f for f in checkout.model_folders() if not any(f.is_relative_to(root) for root in real)]


def serve_command(checkout: Checkout) -> str:
    """A serve that covers the checkout's models and every root that is configured."""
    configured = settings.load().roots
    roots = [Path(root).resolve() for root in (existing_roots(configured) if configured else ())]
    flags = (f"--root {shlex.quote(str(root))}" for root in outermost([*roots, *checkout.model_folders()]))
    return " ".join(["lunashm serve", *flags])


def pip_command(checkout: Checkout) -> str:
    """How lunashm gets into the checkout's own environment; empty where this process runs in it."""
    pythons = [python for python in checkout.pythons if python.parent.parent.resolve() != Path(sys.prefix).resolve()]
    if checkout.pythons and not pythons:
        return ""
    python = str(pythons[0]) if pythons else "python"
    return shlex.join([python, "-m", "pip", "install", requirement()])


def _next_steps(checkout: Checkout, missing: list[Path]) -> list[str]:
    steps = []
    pip = pip_command(checkout)
    if pip:
        steps.append(f"lunashm has to be installed in the Python that runs ComfyUI:\n    {pip}")
    if missing:
        folders = "\n    ".join(map(str, missing))
        steps.append(f"These model folders lie outside the host's roots, and it refuses their files:\n    {folders}")
    steps.append(f"Start the host, unless it runs:\n    {serve_command(checkout) if missing else 'lunashm serve'}")
    steps.append("Then start ComfyUI as always, as often as you like; lunashm ps shows what is shared.")
    return ["Next:", *(f"{number}. {step}" for number, step in enumerate(steps, 1))]


def _plain(value: object) -> object:
    match value:
        case Path():
            return str(value)
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case _:
            return value

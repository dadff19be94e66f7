"""One ComfyUI checkout: its version, the extension in it, whose version that is, and its model folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from lunashm import __version__
from lunashm.cli.checkout import SUPPORTED_FROM, Checkout, Presence, extension
from lunashm.cli.checks.check import Check, State, Task
from lunashm.cli.checks.host import live
from lunashm.cli.comfy import pip_command, roots_missing, serve_command
from lunashm.errors import SettingsError
from lunashm.protocol import PROTOCOL_VERSION


def tasks(path: str) -> Iterator[Task]:
    try:
        checkout = Checkout.at(path)
    except SettingsError as exc:
        fail = Check("comfyui", State.FAIL, exc.message, "give the folder that holds main.py")
        yield Task("comfyui", lambda: fail)
        return
    yield Task("comfyui", lambda: version(checkout))
    yield Task("comfyui python", lambda: interpreter(checkout))
    yield Task("extension", lambda: installed(checkout))
    yield Task("extension and hosts", lambda: against_hosts(checkout))
    yield Task("model folders", lambda: folders(checkout))


def version(checkout: Checkout) -> Check:
    least = ".".join(map(str, SUPPORTED_FROM))
    number = ".".join(map(str, checkout.version))
    if not number:
        text = f"{checkout.path}: its version cannot be read"
        return Check("comfyui", State.WARN, text, f"it should be {least} or newer")
    if checkout.version < SUPPORTED_FROM:
        fix = f"git -C {checkout.path} pull: it should be {least} or newer"
        return Check("comfyui", State.FAIL, f"{checkout.path}: version {number}", fix)
    return Check("comfyui", State.OK, f"{checkout.path}: version {number}")


def interpreter(checkout: Checkout) -> Check:
    """Whether ComfyUI's own virtual environment has this lunashm; it may run with another Python all the same."""
    name = "comfyui python"
    environments = [python.parent.parent.resolve() for python in checkout.pythons]
    if not environments:
        return Check(name, State.OK, f"no virtual environment in {checkout.path}")
    if Path(sys.prefix).resolve() in environments:
        return Check(name, State.OK, f"this one, {sys.executable}")
    has = _version_in(environments[0])
    if has != __version__:
        text = f"{environments[0]} has {f'lunashm {has}' if has else 'no lunashm'}, this is {__version__}"
        return Check(name, State.WARN, text, pip_command(checkout))
    return Check(name, State.OK, f"{environments[0]} has lunashm {has}")


def _version_in(environment: Path) -> str:
    """Of the lunashm that is installed there; empty for none."""
    found = sorted(environment.glob("lib/python*/site-packages/lunashm-*.dist-info"))
    return found[-1].name.removeprefix("lunashm-").removesuffix(".dist-info") if found else ""


def installed(checkout: Checkout) -> Check:
    install = f"lunashm comfy install {checkout.path}"
    match checkout.presence:
        case Presence.ABSENT:
            return Check("extension", State.FAIL, "not installed", install)
        case Presence.FOREIGN:
            return Check("extension", State.FAIL, f"{checkout.node} is not lunashm's", f"move it away, then: {install}")
        case Presence.LINK:
            target = checkout.node.resolve()
            if target != extension():
                return Check("extension", State.FAIL, f"links to {target}, another installation", install)
            return Check("extension", State.OK, f"linked to {target}, version {__version__}")
        case Presence.COPY:
            if checkout.copied_version != __version__:
                text = f"a copy of version {checkout.copied_version or 'unknown'}, this is {__version__}"
                return Check("extension", State.FAIL, text, f"{install} --copy")
            return Check("extension", State.OK, f"a copy of version {__version__}")
        case Presence.PACK:
            version = checkout.copied_version or "unknown"
            if version != __version__:
                text = f"{checkout.node} is a node pack of version {version}, this is {__version__}"
                return Check("extension", State.FAIL, text, "update the older one: the pack with what installed it")
            return Check("extension", State.OK, f"a node pack of version {version}")


def against_hosts(checkout: Checkout) -> Check:
    """The extension's version against that of every host that it may attach to."""
    name = "extension and hosts"
    if checkout.presence not in (Presence.LINK, Presence.COPY, Presence.PACK):
        return Check(name, State.SKIP, "there is no extension of ours")
    hosts = list(live().values())
    if not hosts:
        return Check(name, State.SKIP, "no host is running")
    ours = __version__ if checkout.presence is Presence.LINK else checkout.copied_version
    others = [f"pid {host.pid} ({host.device_name}) has {host.version}" for host in hosts if host.version != ours]
    if others:
        text = f"the extension has version {ours or 'unknown'}, {', '.join(others)}"
        fix = f"install one version everywhere: lunashm comfy install {checkout.path}; lunashm stop; lunashm serve"
        return Check(name, State.FAIL, text, fix)
    return Check(name, State.OK, f"all have version {ours}, protocol {PROTOCOL_VERSION}")


def folders(checkout: Checkout) -> Check:
    hosts = list(live().values())
    missing = roots_missing(checkout, [root for host in hosts for root in host.roots] if hosts else None)
    if missing:
        text = f"outside the host's roots: {', '.join(map(str, missing))}"
        return Check("model folders", State.WARN, text, serve_command(checkout))
    return Check("model folders", State.OK, "all below the host's roots")

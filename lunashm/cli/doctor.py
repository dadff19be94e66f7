"""``lunashm doctor``: is the machine fit, do the hosts answer, has ComfyUI the extension; and what to do if not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.text import Text

from lunashm import __version__, paths, settings
from lunashm import protocol as p
from lunashm.cli import exits
from lunashm.cli.checkout import SUPPORTED_FROM, Checkout, Presence, extension
from lunashm.cli.comfy import roots_missing, serve_command
from lunashm.cli.hosts import ask_once
from lunashm.cli.machine import Check, State, guarded, machine
from lunashm.cli.output import AsJson, Output, clean
from lunashm.errors import LunashmError, SettingsError
from lunashm.paths import Endpoint, find_host


def doctor(
    comfyui: Annotated[str | None, typer.Option("--comfyui", metavar="PATH", help="Look at this ComfyUI, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, the settings and the running hosts; exit code 1 if something fails."""
    checks = [*machine(), *hosts(), *(comfy(comfyui) if comfyui else ())]
    value = {
        "ok": all(check.state is not State.FAIL for check in checks),
        "checks": [{"name": c.name, "state": c.state.value, "detail": c.detail, "fix": c.fix} for c in checks],
    }
    Output(as_json).result(value, *map(_line, checks))
    if not value["ok"]:
        raise typer.Exit(exits.ERROR)


_STYLES = {State.OK: "green", State.WARN: "yellow", State.FAIL: "bold red"}


def _line(check: Check) -> Text:
    text = Text(f"{check.state.value:<5}", style=_STYLES[check.state])
    text.append_text(Text(f"{check.name}: ", style="bold")).append_text(clean(check.detail))
    return text.append_text(clean(f"\n     -> {check.fix}")) if check.fix else text


def hosts() -> Iterator[Check]:
    """Every live host in the runtime directory, and the configured endpoint."""
    try:
        chosen = settings.load()
        known = paths.all_endpoints()
        if chosen.endpoint:
            known.append(Endpoint.parse(chosen.endpoint))
    except LunashmError:
        return  # reported by the checks of settings and runtime directory
    live = [endpoint for endpoint in dict.fromkeys(known) if find_host(endpoint) is not None]
    if not live:
        yield Check("host", State.WARN, "no host is running", "start one with: lunashm serve")
    for endpoint in live:
        yield guarded("host", lambda endpoint=endpoint: _host(endpoint))  # type: ignore[misc]


def _host(endpoint: Endpoint) -> Check:
    status = ask_once(endpoint, p.GetStatus(), p.Status)
    host = status.host
    text = f"pid {host.pid} at {endpoint.url}: {host.device_name}, {host.rung}, version {host.version}"
    if host.version != __version__:
        fix = f"this command is {__version__}: install one version everywhere, then lunashm stop and lunashm serve"
        return Check("host", State.FAIL, text, fix)
    return Check("host", State.OK, text)


def comfy(path: str) -> Iterator[Check]:
    """One ComfyUI checkout and the extension in it."""
    try:
        checkout = Checkout.at(path)
    except SettingsError as exc:
        yield Check("comfyui", State.FAIL, exc.message, "give the folder that holds main.py")
        return
    yield guarded("comfyui", lambda: _comfy_version(checkout))
    yield guarded("extension", lambda: _extension(checkout))
    yield guarded("model folders", lambda: _model_folders(checkout))


def _comfy_version(checkout: Checkout) -> Check:
    least = ".".join(map(str, SUPPORTED_FROM))
    version = ".".join(map(str, checkout.version))
    if not version:
        text = f"{checkout.path}: its version cannot be read"
        return Check("comfyui", State.WARN, text, f"it should be {least} or newer")
    if checkout.version < SUPPORTED_FROM:
        return Check("comfyui", State.FAIL, f"{checkout.path}: version {version}", f"update it to {least} or newer")
    return Check("comfyui", State.OK, f"{checkout.path}: version {version}")


def _extension(checkout: Checkout) -> Check:
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
            return Check("extension", State.OK, f"linked to {target}")
        case Presence.COPY:
            if checkout.copied_version != __version__:
                text = f"a copy of version {checkout.copied_version or 'unknown'}, this is {__version__}"
                return Check("extension", State.FAIL, text, f"{install} --copy")
            return Check("extension", State.OK, f"a copy of version {__version__}")


def _model_folders(checkout: Checkout) -> Check:
    live = [host for endpoint in paths.all_endpoints() if (host := find_host(endpoint)) is not None]
    missing = roots_missing(checkout, [root for host in live for root in host.roots] if live else None)
    if missing:
        text = f"outside the host's roots: {', '.join(map(str, missing))}"
        return Check("model folders", State.WARN, text, serve_command(checkout))
    return Check("model folders", State.OK, "all below the host's roots")

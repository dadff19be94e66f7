"""``lunashm doctor``: is the machine fit, do the hosts answer, has ComfyUI the extension; and what to do if not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.text import Text

from lunashm import __version__
from lunashm.cli import exits
from lunashm.cli.checks import apart, check, comfyui, configured, container, host, limits, memory
from lunashm.cli.checks.check import Check, State, Wanted
from lunashm.cli.output import AsJson, Output, clean, count


def doctor(
    comfy: Annotated[str | None, typer.Option("--comfyui", metavar="PATH", help="Look at this ComfyUI, too.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="Look at this device only: cpu, cuda:N or a UUID.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, the settings and the running hosts; exit code 1 if something fails.

    Torch is imported, and memory really shared between processes: that takes some seconds.
    """
    output, found = Output(as_json), []
    wanted = configured.wanted(device)
    for one in checks(wanted, device, comfy):
        found.append(one)
        if not as_json:
            output.console.print(_line(one))
    failed = sum(one.state is State.FAIL for one in found)
    value = {
        "ok": not failed, "version": __version__, "device": wanted.device, "memory": wanted.memory,
        "checks": [{**dataclasses.asdict(one), "state": one.state.value} for one in found],
    }  # fmt: skip
    warned = sum(one.state is State.WARN for one in found)
    output.result(value, f"{count(len(found), 'check')}: {failed} failed, {count(warned, 'warning')}")
    if failed:
        raise typer.Exit(exits.ERROR)


def checks(wanted: Wanted, device: str | None, comfy: str | None) -> Iterator[Check]:
    """Each as soon as it is made."""
    yield from check.run(configured.tasks(device))
    yield from apart.run("python", wanted)
    yield from check.run(container.tasks(wanted))
    yield from check.run(limits.tasks())
    yield from check.run(memory.tasks(wanted))
    yield from apart.run("gpu", wanted)
    yield from check.run(host.tasks(wanted))
    if comfy is not None:
        yield from check.run(comfyui.tasks(comfy))


_STYLES = {State.OK: "green", State.WARN: "yellow", State.FAIL: "bold red", State.SKIP: "dim"}


def _line(one: Check) -> Text:
    text = Text(f"{one.state.value:<5}", style=_STYLES[one.state])
    text.append_text(Text(f"{one.name}: ", style="bold")).append_text(clean(one.detail))
    return text.append_text(clean(f"\n     -> {one.fix}")) if one.fix else text

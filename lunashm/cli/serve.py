"""``lunashm serve``: the host process, from settings to READY to a clean stop."""

from __future__ import annotations

import logging
import resource
import sys
from pathlib import Path
from typing import Annotated

import typer

from lunashm import settings
from lunashm.cli.output import AsJson, Output, clean
from lunashm.errors import SettingsError
from lunashm.host.address import Address
from lunashm.memory import cuda, probe
from lunashm.memory.probe import Choice
from lunashm.paths import Endpoint
from lunashm.protocol import HostInfo

log = logging.getLogger(__name__)

Roots = Annotated[
    list[str] | None,
    typer.Option("--root", metavar="DIR", help="Serve files below DIR; repeatable. Default: your home directory."),
]


def serve(
    *,
    device: Annotated[
        str | None, typer.Option(help="Where the weights live: cpu, cuda:N or a GPU's UUID; one host each.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="How they are shared: auto, posix, memfd, cuda-vmm or cuda-ipc.")
    ] = None,
    root: Roots = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Control URL, ipc:///path.sock.")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR; to stderr.")] = None,
    ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long a client the host cannot see may stay silent.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="[ADDRESS:]PORT", help="Serve Prometheus metrics; on the loopback unless told otherwise."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Host models until Ctrl-C: load each once, lend it to any number of processes."""
    chosen = settings.load(
        {
            "device": device, "memory": memory, "roots": root or None, "endpoint": endpoint,
            "log_level": log_level.upper() if log_level else None, "lease_ttl_s": ttl, "metrics": metrics,
        }
    )  # fmt: skip
    roots = existing_roots(chosen.roots)
    device = cuda.resolve(chosen.device)
    address = Endpoint.parse(chosen.endpoint) if chosen.endpoint else Endpoint.for_device(device)
    metrics_at = Address.parse(str(chosen.metrics)) if chosen.metrics != "" else None
    logging.basicConfig(
        level=chosen.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    if not chosen.roots:
        log.info("no root is configured: serving files below the home directory, %s (--root DIR narrows it)", roots[0])
    if chosen.device == settings.AUTO and not chosen.endpoint and gpus_there():
        log.info("this host lends RAM, and the machine has a GPU; to share its memory: lunashm serve --device cuda:0")
    try:
        _serve(chosen, device, address, roots, metrics_at, Output(as_json))
    except KeyboardInterrupt:
        log.info("interrupted before it was ready")


def gpus_there(listed: Path = Path("/proc/driver/nvidia/gpus")) -> bool:
    """Whether NVIDIA's driver knows of a GPU. Starts nothing on it."""
    return listed.is_dir() and any(listed.iterdir())


def existing_roots(roots: tuple[str, ...]) -> tuple[str, ...]:
    """Absolute directories; the home directory where none is configured. Raises SettingsError for a missing one."""
    try:
        paths = [Path(root).expanduser().absolute() for root in roots] or [Path.home()]
    except RuntimeError as exc:
        raise SettingsError(f"{exc}; name the directories to serve with --root") from exc
    for path in paths:
        if not path.is_dir():
            raise SettingsError(f"root {path} is no directory; create it, or name another with --root")
    return tuple(map(str, paths))


def allow_descriptors(most: int = 1 << 16) -> int:
    """Let this process open as many files as it may, ``most`` at most: ZeroMQ ends a process that runs out of them.

    Returns the limit that is in force.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def choose_rung(memory: str, device: str) -> Choice:
    """The rung to serve with, by real round trips; what was found out is logged (I5). Raises SettingsError."""
    choice = probe.choose(memory, device)
    for verdict in choice.verdicts:
        level = logging.WARNING if verdict.tried and not verdict.works else logging.INFO
        log.log(level, "memory on %s: %s", cuda.describe(device), verdict)
    if choice.fallback:
        log.warning("memory on %s: sharing by %s, because %s", cuda.describe(device), choice.rung.name, choice.fallback)
    return choice


def _serve(
    chosen: settings.Settings,
    device: str,
    address: Endpoint,
    roots: tuple[str, ...],
    metrics: Address | None,
    output: Output,
) -> None:
    from lunashm.host.server import Server  # noqa: PLC0415 - other commands need none of it

    allow_descriptors()
    choice = choose_rung(chosen.memory, device)
    scrape = None
    if metrics is not None:
        from lunashm.host.scrape import Scrape  # noqa: PLC0415 - most hosts serve none

        scrape = Scrape(metrics)
    server = Server(
        rung=choice.rung, endpoint=address, roots=roots, ttl_s=chosen.lease_ttl_s,
        device_name=cuda.describe(device), rung_reason=choice.fallback,
        reader=scrape.serving if scrape is not None else None,
    )  # fmt: skip

    def ready(info: HostInfo) -> None:
        url = scrape.url if scrape is not None else ""
        value = {"ready": True, "endpoint": info.endpoint, "device": info.device,
                 "device_name": info.device_name, "rung": info.rung, "rung_reason": info.rung_reason,
                 "roots": info.roots, "pid": info.pid, "version": info.version, "metrics": url}  # fmt: skip
        if output.as_json:
            output.result(value)
            return
        served = ":".join(info.roots)
        also = f" metrics={url}" if url else ""
        line = f"READY endpoint={info.endpoint} device={info.device} rung={info.rung} pid={info.pid}{also}"
        print(clean(f"{line} roots={served}").plain, flush=True)

    server.run(ready)

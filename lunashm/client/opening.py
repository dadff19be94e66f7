"""``attach()``: from a path and settings to an attachment, through a host, or privately where that is allowed."""

from __future__ import annotations

import logging
import os

import torch

from lunashm import settings as settings_module
from lunashm.client.attachment import Attachment
from lunashm.client.private import local_copy
from lunashm.client.session import session_for
from lunashm.endpoints import endpoint_of
from lunashm.errors import LunashmError, SettingsError, WrongDevice
from lunashm.manifest import DtypeRule, check_rules
from lunashm.memory import cuda
from lunashm.paths import Endpoint
from lunashm.protocol import HostInfo
from lunashm.settings import Fallback
from lunashm.views import dtype_name

log = logging.getLogger(__name__)

Dtypes = torch.dtype | str | dict[str, torch.dtype | str] | None


def attach(
    path: str | os.PathLike[str],
    *,
    dtypes: Dtypes = None,
    fallback: Fallback | None = None,
    wait_s: float | None = None,
    endpoint: str | None = None,
    device: str | None = None,
    kind: str = "python",
    label: str = "",
) -> Attachment:
    """Attach to the checkpoint at ``path``; the host loads it if nobody has yet.

    ``dtypes``: one dtype, or ``{name prefix: dtype}``; None is as stored. Each conversion is done once, in the host.
    ``fallback`` while the host is still loading: ``wait`` up to ``wait_s`` seconds (default), ``fail`` with
    ModelNotReady, or ``local``: take a private copy, also if there is no host. The rest come from the settings.

    Raises HostUnavailable, HostLost, HostTimeout, LoadTimeout, ModelNotReady, PathNotAllowed, UnsupportedFormat,
    InvalidCheckpoint, OutOfSharedMemory, WrongDevice, SettingsError.
    """
    chosen = settings_module.load({"fallback": fallback, "wait_s": wait_s, "endpoint": endpoint, "device": device})
    rules = rules_of(dtypes)
    named = os.path.abspath(os.fsdecode(path))
    try:
        session = session_for(endpoint_of(chosen), kind=kind, label=label)
        if chosen.endpoint and chosen.device != settings_module.Settings().device:
            _refuse_other_device(session.connect(), chosen.device)
        return Attachment.open(session, named, rules, chosen.wait_s if chosen.fallback == "wait" else 0.0)
    except SettingsError:
        raise
    except LunashmError as exc:
        if chosen.fallback != "local":
            raise
        log.warning("loading %s locally, not shared: %s", named, exc)
        there = Endpoint.parse(chosen.endpoint).device if chosen.endpoint else ""
        return local_copy(named, rules, exc, there or cuda.resolve(chosen.device))


def rules_of(dtypes: Dtypes) -> tuple[DtypeRule, ...]:
    """The wire form of :func:`attach`'s ``dtypes``; whatever is not named stays as stored. Raises UnsupportedFormat."""
    table = dtypes if isinstance(dtypes, dict) else {"": dtypes}
    named = {prefix: dtype_name(d) if isinstance(d, torch.dtype) else d or "" for prefix, d in table.items()}
    return check_rules(DtypeRule(prefix, dtype) for prefix, dtype in {"": "", **named}.items())


def _refuse_other_device(host: HostInfo, device: str) -> None:
    """An endpoint and a device were named: the host there has to be that device's. Raises WrongDevice."""
    ours = cuda.resolve(device)
    if host.device != ours:
        raise WrongDevice(
            f"the host at {host.endpoint} lends memory of {host.device_name} ({host.device}), and {device} is "
            f"{cuda.describe(ours)} ({ours}) in this process; leave out the endpoint, or name the host's device"
        )

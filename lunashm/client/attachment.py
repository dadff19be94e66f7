"""A model this process is attached to: a state dict over mapped bytes, and how to keep it current."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from types import TracebackType

import torch
from blake3 import blake3

from lunashm import settings as settings_module
from lunashm.client.session import Session, session_for
from lunashm.errors import ForkedProcess, LunashmError, ModelNotReady, SettingsError, SourceChanged
from lunashm.manifest import DtypeRule, Manifest, check_rules, validate
from lunashm.memory import Mapping
from lunashm.paths import Endpoint
from lunashm.settings import Fallback
from lunashm.views import DTYPES, NAMES, state_dict

log = logging.getLogger(__name__)

Dtypes = torch.dtype | str | dict[str, torch.dtype | str] | None


class Attachment:
    """What :func:`attach` returns. Thread-safe; refuses to work in a forked child.

    ``shared`` is False for a private copy that ``fallback="local"`` made; ``reason`` then says why.
    """

    def __init__(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        self._manifest = manifest
        self._tensors: dict[str, torch.Tensor] | None = tensors
        self._mappings: tuple[Mapping, ...] = ()
        self._session: Session | None = None
        self._epoch = 0
        self._rules: tuple[DtypeRule, ...] = ()
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self.lease = 0
        self.shared = False
        self.reason = ""

    @classmethod
    def open(cls, session: Session, path: str, rules: tuple[DtypeRule, ...], wait_s: float) -> Attachment:
        """Attach through ``session``. Raises what the host answers; I4: all of the model or an error."""
        reply, mappings, epoch = session.attach(path, rules, wait_s)
        validate(reply.manifest)
        if len(mappings) != len(reply.manifest.segments):
            raise LunashmError(f"host sent {len(mappings)} segments of {len(reply.manifest.segments)} for {path}")
        attachment = cls(reply.manifest, state_dict(reply.manifest, [mapping.buffer for mapping in mappings]))
        attachment._mappings = mappings
        attachment._session = session
        attachment._epoch = epoch
        attachment._rules = rules
        attachment.lease = reply.lease
        attachment.shared = True
        return attachment

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def metadata(self) -> dict[str, str]:
        """The checkpoint's own ``__metadata__``."""
        return dict(self._manifest.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self._manifest.nbytes

    @property
    def attached(self) -> bool:
        """Whether a live host holds a lease for us. False after its death: the views stay valid, nobody counts them."""
        session = self._session
        return self.shared and session is not None and session.host is not None and session.epoch == self._epoch

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A fresh dict of read-only tensors; loaders may pop from it. A write to a shared tensor kills the process.

        Raises LunashmError after :meth:`close`, ForkedProcess in a forked child.
        """
        if os.getpid() != self._pid:
            raise ForkedProcess(
                f"attachment of {self._manifest.name} belongs to pid {self._pid}, not to its forked child; "
                "attach in the child, or start it with the spawn method"
            )
        if self._tensors is None:
            raise LunashmError(f"attachment of {self._manifest.name} is closed; attach again")
        return dict(self._tensors)

    def checksum(self) -> str:
        """BLAKE3 over the shared bytes as they are now, padding included: equal before and after means untouched."""
        if not self._mappings:
            raise LunashmError(f"{self._manifest.name} is not mapped from a host; there is nothing shared to sum")
        hasher = blake3()
        for mapping in self._mappings:
            hasher.update(mapping.buffer)
        return hasher.hexdigest()

    def reattached(self, wait_s: float) -> Attachment:
        """The same bytes from the host that is there now, as a new attachment; close this one when it is in use.

        Raises SourceChanged if the file holds other bytes by now, or what :meth:`open` raises.
        """
        if self._session is None:
            raise LunashmError(f"{self._manifest.name} was loaded locally; attach() it instead")
        fresh = Attachment.open(self._session, self._manifest.source.path, self._rules, wait_s)
        if fresh.manifest.digest != self._manifest.digest:
            fresh.close()
            raise SourceChanged(f"{self._manifest.source.path} holds other bytes now; the mapped ones stay in use")
        return fresh

    def close(self) -> None:
        """Let go. The lease ends when the last tensor of this mapping in this process is gone. Idempotent."""
        with self._mutex:
            self._tensors = None
            self._mappings = ()


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
    InvalidCheckpoint, OutOfSharedMemory, SettingsError.
    """
    chosen = settings_module.load(
        {"fallback": fallback, "wait_s": wait_s, "endpoint": endpoint, "device": device}
    )  # fmt: skip
    rules = rules_of(dtypes)
    real = os.path.realpath(path)
    try:
        address = Endpoint.parse(chosen.endpoint) if chosen.endpoint else Endpoint.for_device(chosen.device)
        session = session_for(address, kind=kind, label=label)
        return Attachment.open(session, real, rules, chosen.wait_s if chosen.fallback == "wait" else 0.0)
    except SettingsError:
        raise
    except LunashmError as exc:
        if chosen.fallback != "local":
            raise
        log.warning("loading %s locally, not shared: %s", real, exc)
        return _local(Path(real), rules, exc)


def rules_of(dtypes: Dtypes) -> tuple[DtypeRule, ...]:
    """The wire form of :func:`attach`'s ``dtypes``; whatever is not named stays as stored."""
    table = dtypes if isinstance(dtypes, dict) else {"": dtypes}
    named = {prefix: NAMES[dtype] if isinstance(dtype, torch.dtype) else dtype or "" for prefix, dtype in table.items()}
    return check_rules(DtypeRule(prefix, dtype) for prefix, dtype in {"": "", **named}.items())


def _local(path: Path, rules: tuple[DtypeRule, ...], why: LunashmError) -> Attachment:
    """A private copy. The host's own checks (pickle, damage) are safetensors' here."""
    from safetensors import safe_open

    from lunashm.manifest import RuleBook, Source

    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise why
    book = RuleBook(rules)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise why from None
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(DTYPES[book.resolve(name, NAMES[tensor.dtype])])
    stat = path.stat()
    source = Source(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    manifest = Manifest(path.name, "", 0, source, rules, (), (), metadata)
    attachment = Attachment(manifest, tensors)
    attachment.reason = f"{'still loading in the host' if isinstance(why, ModelNotReady) else why.message}"
    return attachment

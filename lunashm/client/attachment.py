"""A model this process is attached to: a state dict over mapped bytes, and how to keep it current."""

from __future__ import annotations

import logging
import os
import weakref
from types import TracebackType

import torch
from blake3 import blake3

from lunashm.client.access import explained
from lunashm.client.lora import AppliedLora, apply_lora
from lunashm.client.session import Session
from lunashm.client.watch import Guard, HostWatch
from lunashm.errors import (
    ForkedProcess,
    InvalidCheckpoint,
    LunashmError,
    PathNotAllowed,
    SourceChanged,
)
from lunashm.manifest import DtypeRule, Manifest, validate
from lunashm.memory import Mapping
from lunashm.views import state_dict

log = logging.getLogger(__name__)

_CHECKSUM_NBYTES = 64 << 20
"""How much is looked at at once; on a GPU it is copied to RAM for that."""

Dtypes = torch.dtype | str | dict[str, torch.dtype | str] | None


class Attachment:
    """What :func:`attach` returns. Thread-safe; refuses to work in a forked child.

    ``shared`` is False for a private copy that ``fallback="local"`` made; ``reason`` then says why, and the manifest
    describes that copy: no digest, no segments. ``lease`` is the host's number for it, 0 for a private copy.
    """

    def __init__(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        self._manifest = manifest
        self._tensors: dict[str, torch.Tensor] | None = tensors
        self._mappings: tuple[Mapping, ...] = ()
        self._session: Session | None = None
        self._epoch = 0
        self._watch: HostWatch | None = None
        self._path = manifest.source.path
        self._rules: tuple[DtypeRule, ...] = ()
        self._pid = os.getpid()
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self.lease = 0
        self.shared = False
        self.reason = ""

    @classmethod
    def open(cls, session: Session, path: str, rules: tuple[DtypeRule, ...], wait_s: float) -> Attachment:
        """Attach through ``session``. Raises what the host answers; I4: all of the model or an error."""
        try:
            reply, mappings, epoch, watch = session.attach(path, rules, wait_s)
        except PathNotAllowed as exc:
            raise explained(exc, path) from None
        manifest = reply.manifest
        validate(manifest)
        if tuple(handle.nbytes for handle in reply.handles) != manifest.segments:
            raise InvalidCheckpoint(f"the host's segments of {path} do not match its manifest; unload it, then load it")
        _refuse_other_file(path, manifest)
        attachment = cls(manifest, state_dict(manifest, mappings))
        attachment._mappings = mappings
        attachment._session = session
        attachment._epoch = epoch
        attachment._watch = watch
        attachment._path = path
        attachment._rules = rules
        attachment.lease = reply.lease
        attachment.shared = True
        return attachment

    def __repr__(self) -> str:
        where = f"shared, lease {self.lease}" if self.shared else f"private: {self.reason}"
        return f"<Attachment of {self._manifest.name}, {len(self._manifest.tensors)} tensors, {where}>"

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
        """Whether a live host holds a lease for us. False after its death: the views stay valid, nobody counts them.

        Raises ForkedProcess in a forked child, as everything here does but :meth:`close`.
        """
        self._check_process()
        session = self._session
        return self.shared and session is not None and session.host is not None and session.epoch == self._epoch

    @property
    def fail_stop(self) -> bool:
        """Whether the bytes die with the host (``cuda-ipc``), so that every use has to be checked."""
        return self._watch is not None

    @property
    def lost(self) -> bool:
        """Whether the bytes went with the host. Never where they outlive it."""
        return self._watch is not None and self._watch.lost

    def check(self) -> None:
        """Ask before using the tensors, and again when the device is done with them, before using what came out.

        Raises HostLost where the bytes went with the host. Does nothing where they outlive it.
        """
        if self._watch is not None:
            self._watch.check()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A fresh dict of read-only tensors; loaders may pop from it. A write to a shared tensor kills the process.

        Raises LunashmError after :meth:`close`, ForkedProcess in a forked child, HostLost as :meth:`check`.
        """
        self._check_process()
        self.check()
        tensors = self._tensors
        if tensors is None:
            raise LunashmError(f"attachment of {self._manifest.name} is closed; attach again")
        return dict(tensors)

    def load_into(self, module: torch.nn.Module, prefix: str = "") -> None:
        """Make ``module``'s parameters the mapped bytes, and remember it (weakly) for :meth:`apply_lora`.

        The tensors whose names begin with ``prefix`` count, without it; they have to be the module's own, as
        ``load_state_dict`` demands. Buffers are copied: layers write to theirs. Raises RuntimeError from
        ``load_state_dict``, LunashmError where the module took copies (I7); the module is not whole after either.

        Where the bytes die with the host, each call of ``module`` or of a part of it asks :meth:`check` first; ask
        again after the last.
        """
        buffers = {name for name, _ in module.named_buffers()}
        found = {name.removeprefix(prefix): t for name, t in self.state_dict().items() if name.startswith(prefix)}
        module.load_state_dict({n: t.clone() if n in buffers else t for n, t in found.items()}, assign=True)
        own = {tensor.data_ptr() for tensor in found.values() if tensor.numel()}
        copies = [n for n, p in module.named_parameters() if p.numel() and (p.is_meta or p.data_ptr() not in own)]
        if copies:
            raise LunashmError(
                f"{len(copies)} parameters of {type(module).__name__} are copies, not {self._manifest.name}'s bytes: "
                f"{', '.join(copies[:5])}; it loads its state dict in a way of its own, assign them yourself"
            )
        self._modules = [known for known in self._modules if known() not in (None, module)]
        self._modules.append(weakref.ref(module))
        if self._watch is not None:
            for part in (module, *module.children()):  # a VAE's encode() and decode() call parts only
                part.register_forward_pre_hook(Guard(part, self._watch.check))

    def apply_lora(
        self,
        path: str | os.PathLike[str],
        strength: float = 1.0,
        *,
        module: torch.nn.Module | None = None,
        prefix: str = "",
    ) -> AppliedLora:
        """Apply a LoRA file (kohya's, PEFT's or diffusers' names) until its ``remove()``, or as a context manager.

        ``module``: what to apply it to; by default what :meth:`load_into` has filled and is still there. ``prefix``
        limits it to one part of the file, such as ``text_encoder_2``. The shared weights are only read.

        Raises LunashmError where there is no module, and what :func:`lunashm.client.lora.apply_lora` raises; after
        any error the modules are as they were.
        """
        self._check_process()
        modules = [found for found in (known() for known in self._modules) if found is not None]
        if module is None and not modules:
            raise LunashmError(
                f"no module has {self._manifest.name}'s weights through load_into(); load one with it, or say module="
            )
        return apply_lora(modules if module is None else [module], path, strength, prefix)

    def checksum(self) -> str:
        """BLAKE3 over the shared bytes as they are now, padding included: equal before and after means untouched."""
        self._check_process()
        mappings = self._mappings
        if not mappings:
            raise LunashmError(f"{self._manifest.name} is not mapped from a host; there is nothing shared to sum")
        hasher = blake3()
        for mapping in mappings:
            for start in range(0, mapping.handle.nbytes, _CHECKSUM_NBYTES):
                self.check()
                hasher.update(mapping.peek(start, min(_CHECKSUM_NBYTES, mapping.handle.nbytes - start)))
        self.check()
        return hasher.hexdigest()

    def reattached(self, wait_s: float) -> Attachment:
        """The same bytes from the host that is there now, as a new attachment; close this one when it is in use.

        Raises SourceChanged if the file holds other bytes by now, or what :meth:`open` raises.
        """
        self._check_process()
        if self._session is None:
            raise LunashmError(f"{self._manifest.name} was loaded locally; attach() it instead")
        fresh = Attachment.open(self._session, self._path, self._rules, wait_s)
        if fresh.manifest.digest != self._manifest.digest:
            fresh.close()
            raise SourceChanged(f"{self._path} holds other bytes now; the mapped ones stay in use")
        return fresh

    def close(self) -> None:
        """Let go. The lease ends when the last tensor of this mapping in this process is gone. Idempotent."""
        self._tensors = None
        self._mappings = ()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcess(
                f"attachment of {self._manifest.name} belongs to pid {self._pid}, not to its forked child; "
                "attach in the child, or start it with the spawn method"
            )


def _refuse_other_file(path: str, manifest: Manifest) -> None:
    """A host in a container may see another file under the same name. One that we cannot see is taken on trust.

    Raises SourceChanged.
    """
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):
        return
    if size != manifest.source.size:
        raise SourceChanged(
            f"the host's {manifest.source.path} has {manifest.source.size} bytes, the one seen here {size}: another "
            "file, or it is being written; attach again when it is complete"
        )

"""Every error lunashm raises on purpose, in one tree. Knows nothing of torch, sockets or memory.

    LunashmError
    ├── SettingsError            a flag, variable or lunashm.toml entry makes no sense
    ├── HostError
    │   ├── HostUnavailable      nobody serves at this endpoint
    │   ├── HostLost             the host died, or restarted, while we were attached
    │   ├── HostTimeout          the host is there but did not answer in time
    │   └── AlreadyServing       another process hosts this device
    ├── ProtocolError
    │   ├── ProtocolMismatch     the peer speaks another protocol version
    │   ├── MalformedMessage     bytes that are no message
    │   ├── MessageTooLarge      a message over the size limit
    │   ├── NotRegistered        a request from a client the host does not know (out of order, or host restarted)
    │   └── TicketRefused        descriptors asked for with a ticket that is used, too old, or somebody else's
    ├── ModelError
    │   ├── ModelNotFound        no loaded model of that name, or no such file
    │   ├── ModelInUse           clients hold it
    │   ├── ModelNotReady        still loading, and the caller did not want to wait
    │   ├── LoadTimeout          still loading at the caller's deadline
    │   ├── LoadCancelled        unloaded while it was loading
    │   ├── PathNotAllowed       outside the host's roots
    │   ├── UnsupportedFormat    pickle, or a dtype we do not know
    │   ├── InvalidCheckpoint    a file whose header, offsets or size contradict each other
    │   └── SourceChanged        the file changed while it was read, or is not the one the client sees
    ├── LoraError
    │   ├── InvalidLora          a file that is damaged, holds no LoRA, or NaN or infinite factors
    │   ├── UnsupportedLora      an adapter, or a layer, that there is no low-rank form for
    │   └── LoraMismatch         a LoRA whose layers or shapes are not this model's
    ├── SharedMemoryError
    │   ├── OutOfSharedMemory    the segment does not fit
    │   ├── SegmentFrozen        a write after freeze()
    │   ├── SegmentNotFrozen     an export before freeze()
    │   ├── SegmentGone          a handle whose memory no longer exists
    │   └── WrongDevice          memory of a GPU that this process does not use
    ├── LeaseError
    │   └── LeaseUnknown         released, expired or never granted
    └── ForkedProcess            used after fork(); attach again in the child

``code`` is the stable name that crosses the wire and appears in ``--json`` output.
"""

from __future__ import annotations

from typing import ClassVar


class LunashmError(Exception):
    """Root of the tree. ``str(error)`` says what happened, to what, and what to do."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SettingsError(LunashmError):
    code = "settings"


class HostError(LunashmError):
    code = "host"


class HostUnavailable(HostError):
    code = "host_unavailable"


class HostLost(HostError):
    code = "host_lost"


class HostTimeout(HostError):
    code = "host_timeout"


class AlreadyServing(HostError):
    code = "already_serving"


class ProtocolError(LunashmError):
    code = "protocol"


class ProtocolMismatch(ProtocolError):
    code = "protocol_mismatch"


class MalformedMessage(ProtocolError):
    code = "malformed_message"


class MessageTooLarge(ProtocolError):
    code = "message_too_large"


class NotRegistered(ProtocolError):
    code = "not_registered"


class TicketRefused(ProtocolError):
    code = "ticket_refused"


class ModelError(LunashmError):
    code = "model"


class ModelNotFound(ModelError):
    code = "model_not_found"


class ModelInUse(ModelError):
    code = "model_in_use"


class ModelNotReady(ModelError):
    code = "model_not_ready"


class LoadTimeout(ModelError):
    code = "load_timeout"


class LoadCancelled(ModelError):
    code = "load_cancelled"


class PathNotAllowed(ModelError):
    code = "path_not_allowed"


class UnsupportedFormat(ModelError):
    code = "unsupported_format"


class InvalidCheckpoint(ModelError):
    code = "invalid_checkpoint"


class SourceChanged(ModelError):
    code = "source_changed"


class LoraError(LunashmError):
    code = "lora"


class InvalidLora(LoraError):
    code = "invalid_lora"


class UnsupportedLora(LoraError):
    code = "unsupported_lora"


class LoraMismatch(LoraError):
    code = "lora_mismatch"


class SharedMemoryError(LunashmError):
    code = "shared_memory"


class OutOfSharedMemory(SharedMemoryError):
    code = "out_of_shared_memory"


class SegmentFrozen(SharedMemoryError):
    code = "segment_frozen"


class SegmentNotFrozen(SharedMemoryError):
    code = "segment_not_frozen"


class SegmentGone(SharedMemoryError):
    code = "segment_gone"


class WrongDevice(SharedMemoryError):
    code = "wrong_device"


class LeaseError(LunashmError):
    code = "lease"


class LeaseUnknown(LeaseError):
    code = "lease_unknown"


class ForkedProcess(LunashmError):
    code = "forked_process"


def _tree(root: type[LunashmError]) -> dict[str, type[LunashmError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[str, type[LunashmError]] = _tree(LunashmError)


def from_code(code: str, message: str) -> LunashmError:
    """The error a reply names. An unknown code (a newer host) keeps its text as a plain LunashmError."""
    return BY_CODE.get(code, LunashmError)(message)

"""The messages between clients and host, and their bytes. Knows no sockets; PROTOCOL.md is the specification.

A message is two frames: a fixed 14-byte header (magic, protocol version, id) and a msgpack body, a tagged
msgspec struct. The version lives in the header so that a peer of any version can be told of a mismatch. Where
descriptors are handed over, both frames are one datagram.
"""

from __future__ import annotations

import struct
from typing import Annotated, TypeVar

import msgspec

from lunashm.errors import MalformedMessage, MessageTooLarge, ProtocolMismatch
from lunashm.manifest import DtypeRule, Manifest

PROTOCOL_VERSION = 2
MAX_REQUEST_BYTES = 1 << 20
"""A request's body; the host answers a larger one with MessageTooLarge."""
MAX_FRAME_BYTES = 64 << 20
"""What ZeroMQ lets in at all; a peer that sends more is disconnected."""
MAX_DATAGRAM_BYTES = 4096
"""A message where descriptors are handed over, header included."""
DESCRIPTORS_PER_DATAGRAM = 128
"""Linux allows 253 (SCM_MAX_FD)."""

_HEADER = struct.Struct("!4sHQ")
_MAGIC = b"LUNA"


Wait = Annotated[float, msgspec.Meta(ge=0.0)]
"""Seconds to wait; NaN and negative numbers are malformed, infinity is patience."""


class Message(msgspec.Struct, frozen=True, tag=lambda name: name, forbid_unknown_fields=True):
    """Base of everything on the wire."""


# -- facts that several messages carry ---------------------------------------------------------------------------


class Handle(msgspec.Struct, frozen=True):
    """One exported segment: ``data`` means something only to the memory rung named by ``rung``."""

    rung: str
    device: str
    nbytes: int
    data: bytes


class HostInfo(msgspec.Struct, frozen=True):
    """``host_id`` is new for every run of a host; ``started_at`` in seconds since the epoch.

    ``device`` is ``cpu`` or a GPU's UUID, ``device_name`` what people call it (``cuda:0, NVIDIA H100``).
    ``rung_reason``: why the memory is not shared in the usual way there; empty where it is."""

    host_id: str
    pid: int
    pid_namespace: int
    device: str
    device_name: str
    rung: str
    rung_reason: str
    endpoint: str
    version: str
    roots: tuple[str, ...]
    started_at: float


class ClientInfo(msgspec.Struct, frozen=True):
    """``pid_namespace`` (an inode) and ``start_ticks`` (clock ticks since boot) let the host see whether ``pid`` means
    the same process to it. ``kind`` is the sort of program, ``label`` which one, for people to read."""

    pid: int
    pid_namespace: int
    start_ticks: int
    kind: str
    label: str
    version: str


class LeaseInfo(msgspec.Struct, frozen=True):
    lease: int
    client: str
    pid: int
    kind: str
    label: str
    model: str
    generation: int
    held_s: float


class ClientStatus(msgspec.Struct, frozen=True):
    client: str
    info: ClientInfo
    watched: str
    since_s: float
    last_seen_s: float
    leases: tuple[LeaseInfo, ...]


class ModelInfo(msgspec.Struct, frozen=True):
    """``state``: loading, ready or draining. ``dtypes``: bytes of each. ``nbytes``: of all tensors; ``memory_nbytes``
    counts padding too. ``saved``: bytes that private copies would have cost, (clients - 1) * nbytes.
    """

    name: str
    path: str
    digest: str
    generation: int
    state: str
    rung: str
    dtypes: dict[str, int]
    tensors: int
    nbytes: int
    memory_nbytes: int
    loaded_nbytes: int
    clients: int
    saved: int
    until: str
    load_s: float
    rules: tuple[DtypeRule, ...]


# -- requests ------------------------------------------------------------------------------------------------------


class Register(Message, frozen=True):
    info: ClientInfo


class Renew(Message, frozen=True):
    client: str


class Unregister(Message, frozen=True):
    client: str


class Attach(Message, frozen=True):
    """``wait_s`` = 0: answer ModelNotReady at once if the model is not loaded (loading starts all the same)."""

    client: str
    path: str
    rules: tuple[DtypeRule, ...]
    wait_s: Wait


class Detach(Message, frozen=True):
    client: str
    lease: int


class Load(Message, frozen=True):
    path: str
    rules: tuple[DtypeRule, ...]
    wait_s: Wait


class Unload(Message, frozen=True):
    name: str
    force: bool


class ListModels(Message, frozen=True):
    pass


class ShowModel(Message, frozen=True):
    name: str


class ListClients(Message, frozen=True):
    pass


class GetStatus(Message, frozen=True):
    pass


class Shutdown(Message, frozen=True):
    pass


Request = (
    Register | Renew | Unregister | Attach | Detach | Load | Unload
    | ListModels | ShowModel | ListClients | GetStatus | Shutdown
)  # fmt: skip


# -- replies -------------------------------------------------------------------------------------------------------


class Registered(Message, frozen=True):
    client: str
    host: HostInfo
    ttl_s: float
    renew_every_s: float


class Done(Message, frozen=True):
    """The request took effect and there is nothing more to say."""


class Attached(Message, frozen=True):
    """``ticket``: what the descriptors of ``handles`` can be fetched with, once; empty where handles are enough."""

    lease: int
    manifest: Manifest
    handles: tuple[Handle, ...]
    ticket: bytes


class Loaded(Message, frozen=True):
    model: ModelInfo
    was_loaded: bool


class Unloaded(Message, frozen=True):
    """``freed`` is False while clients still hold the model: memory goes when the last one lets go (I2)."""

    model: ModelInfo
    freed: bool
    told: tuple[LeaseInfo, ...]


class Models(Message, frozen=True):
    models: tuple[ModelInfo, ...]


class ModelDetail(Message, frozen=True):
    model: ModelInfo
    manifest: Manifest
    leases: tuple[LeaseInfo, ...]


class Clients(Message, frozen=True):
    clients: tuple[ClientStatus, ...]


class Status(Message, frozen=True):
    host: HostInfo
    uptime_s: float
    models: tuple[ModelInfo, ...]
    clients: int
    leases: int
    shared_nbytes: int
    saved_nbytes: int
    free_nbytes: int
    counters: dict[str, int]


class ErrorReply(Message, frozen=True):
    code: str
    message: str


Reply = (
    Registered | Done | Attached | Loaded | Unloaded | Models | ModelDetail | Clients | Status | ErrorReply
)  # fmt: skip


# -- handing descriptors over (a Unix socket of its own) ----------------------------------------------------------


class Redeem(Message, frozen=True):
    """The one thing a client says there: the ticket of an Attached."""

    ticket: bytes


class HandedOver(Message, frozen=True):
    """Its datagram carries the descriptors of the handles from ``first`` on; all datagrams together ``total``."""

    first: int
    total: int


Handed = HandedOver | ErrorReply


# -- events (PUB) --------------------------------------------------------------------------------------------------


class LoadProgress(Message, frozen=True):
    path: str
    name: str
    done: int
    total: int
    elapsed_s: float


class LoadFailed(Message, frozen=True):
    path: str
    code: str
    message: str


class ModelReady(Message, frozen=True):
    model: ModelInfo


class UnloadRequested(Message, frozen=True):
    """Clients that hold this generation are asked to let go of it."""

    name: str
    generation: int


class ModelFreed(Message, frozen=True):
    name: str
    generation: int
    nbytes: int


class ClientJoined(Message, frozen=True):
    client: str
    info: ClientInfo


class ClientLeft(Message, frozen=True):
    client: str
    pid: int
    reason: str


class LeaseGranted(Message, frozen=True):
    lease: LeaseInfo


class LeaseEnded(Message, frozen=True):
    lease: int
    model: str
    reason: str


class HostStopping(Message, frozen=True):
    host_id: str
    reason: str


Event = (
    LoadProgress | LoadFailed | ModelReady | UnloadRequested | ModelFreed | ClientJoined | ClientLeft
    | LeaseGranted | LeaseEnded | HostStopping
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_redeem_decoder: msgspec.msgpack.Decoder[Redeem] = msgspec.msgpack.Decoder(Redeem)
_handed_decoder: msgspec.msgpack.Decoder[Handed] = msgspec.msgpack.Decoder(Handed)

_T = TypeVar("_T")


def pack(message: Message, message_id: int, limit: int = MAX_FRAME_BYTES) -> list[bytes]:
    """The two frames of ``message``. ``message_id``: chosen by the requester and echoed; a sequence number in events.

    Raises MessageTooLarge over ``limit`` bytes of body, MalformedMessage for text or numbers msgpack cannot hold.
    """
    try:
        body = _encoder.encode(message)
    except (UnicodeEncodeError, OverflowError) as exc:
        raise MalformedMessage(f"{type(message).__name__} cannot be sent: {exc}") from exc
    if len(body) > limit:
        raise MessageTooLarge(f"a {type(message).__name__} of {len(body)} bytes is over the limit of {limit}")
    return [_HEADER.pack(_MAGIC, PROTOCOL_VERSION, message_id), body]


def pack_request(request: Message, message_id: int) -> list[bytes]:
    """Like :func:`pack`, with the limit that the host holds requests to."""
    return pack(request, message_id, MAX_REQUEST_BYTES)


def read_header(frame: bytes) -> int:
    """The message id. Raises MalformedMessage or ProtocolMismatch."""
    if len(frame) != _HEADER.size:
        raise MalformedMessage(f"a header has {_HEADER.size} bytes, this one has {len(frame)}")
    magic, version, message_id = _HEADER.unpack(frame)
    if magic != _MAGIC:
        raise MalformedMessage(f"a header starts with {_MAGIC!r}, this one with {magic!r}")
    if version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the peer speaks protocol {version}, this lunashm speaks {PROTOCOL_VERSION}; "
            "install the same lunashm version in the host's and every client's environment"
        )
    return int(message_id)


def peek_id(frame: bytes) -> int:
    """The id of any header that is long enough, whatever its version; 0 otherwise. For answering a bad message."""
    return int(_HEADER.unpack(frame)[2]) if len(frame) == _HEADER.size else 0


def read_request(body: bytes) -> Request:
    """Raises MessageTooLarge or MalformedMessage."""
    if len(body) > MAX_REQUEST_BYTES:
        raise MessageTooLarge(f"a request has at most {MAX_REQUEST_BYTES} bytes, this one has {len(body)}")
    return _decode(_request_decoder, body)


def read_reply(body: bytes) -> Reply:
    return _decode(_reply_decoder, body)


def read_event(body: bytes) -> Event:
    return _decode(_event_decoder, body)


def pack_datagram(message: Redeem | Handed, message_id: int) -> bytes:
    """Both frames in one. Raises as :func:`pack`."""
    return b"".join(pack(message, message_id, MAX_DATAGRAM_BYTES - _HEADER.size))


def split_datagram(data: bytes) -> tuple[bytes, bytes]:
    """Its header and its body, neither of them read yet."""
    return data[: _HEADER.size], data[_HEADER.size :]


def read_redeem(body: bytes) -> Redeem:
    return _decode(_redeem_decoder, body)


def read_handed(body: bytes) -> Handed:
    return _decode(_handed_decoder, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedMessage(f"body is no known message: {exc}") from exc

from __future__ import annotations

import contextlib
import inspect
import re
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunashm import protocol as p
from lunashm.errors import BY_CODE, LunashmError, MalformedMessage, MessageTooLarge, ProtocolMismatch
from lunashm.manifest import DtypeRule, Manifest, Source, TensorSpec
from tests import golden_messages, messages

SPECIFICATION = (Path(__file__).parents[1] / "PROTOCOL.md").read_text()


def message_types() -> list[type[p.Message]]:
    found = [cls for _, cls in inspect.getmembers(p, inspect.isclass) if issubclass(cls, p.Message)]
    return [cls for cls in found if cls is not p.Message]


def read(message: p.Message, body: bytes) -> p.Message:
    if message in messages.REQUESTS:
        return p.read_request(body)
    if message in messages.HANDOVER:
        return p.read_redeem(body) if isinstance(message, p.Redeem) else p.read_handed(body)
    return p.read_reply(body) if message in messages.REPLIES else p.read_event(body)


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_protocol_version_is_two() -> None:
    assert p.PROTOCOL_VERSION == 2


def test_every_message_type_has_a_sample_and_golden_bytes() -> None:
    names = {cls.__name__ for cls in message_types()}
    assert {type(message).__name__ for message in messages.ALL} == names
    assert set(golden_messages.BODIES) == names


@pytest.mark.parametrize("message", messages.ALL, ids=lambda message: type(message).__name__)
def test_message_has_its_golden_bytes_and_is_read_back_from_them(message: p.Message) -> None:
    header, body = p.pack(message, messages.MESSAGE_ID)
    assert header.hex() == golden_messages.HEADER
    assert body.hex() == golden_messages.BODIES[type(message).__name__]
    assert read(message, body) == message


def test_header_is_magic_version_and_id_in_network_order() -> None:
    header, _ = p.pack(p.Done(), 7)
    assert header == b"LUNA" + struct.pack("!HQ", 2, 7)
    assert p.read_header(header) == 7


def test_datagram_is_header_and_body_in_one() -> None:
    message = p.Redeem(b"\x01" * 32)
    data = p.pack_datagram(message, 7)
    assert data == b"".join(p.pack(message, 7))
    assert p.split_datagram(data) == tuple(p.pack(message, 7))
    assert p.split_datagram(b"short") == (b"short", b"")
    with pytest.raises(MessageTooLarge):
        p.pack_datagram(p.Redeem(bytes(p.MAX_DATAGRAM_BYTES)), 7)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [b"", b"LUNA", b"LUNA" + bytes(11), b"XUNA" + struct.pack("!HQ", 2, 7)])
def test_header_of_wrong_size_or_magic_is_malformed(header: bytes) -> None:
    with pytest.raises(MalformedMessage):
        p.read_header(header)


def test_other_version_is_a_mismatch_that_names_both_and_can_still_be_answered() -> None:
    header = b"LUNA" + struct.pack("!HQ", 1, 7)
    with pytest.raises(ProtocolMismatch, match="speaks protocol 1, this lunashm speaks 2"):
        p.read_header(header)
    assert p.peek_id(header) == 7
    assert p.peek_id(header[:-1]) == 0


def body_of(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        body_of(),
        body_of(type="Nonsense"),
        body_of(type="Done"),  # a reply is no request
        body_of(type="Renew"),
        body_of(type="Renew", client=5),
        body_of(type="Renew", client="c", more=1),
        body_of(type="Detach", client="c", lease="41"),
        body_of(type="Attach", client="c", path="/m", rules=[["", "", ""]], wait_s=0.0),
        body_of(type="Attach", client="c", path="/m", rules=[], wait_s=-1.0),
        body_of(type="Attach", client="c", path="/m", rules=[], wait_s=float("nan")),
        p.pack(p.Shutdown(), 1)[1] + b"\x00",
    ],
)
def test_body_that_is_no_request_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        p.read_request(body)


def test_request_over_the_limit_is_refused_by_both_ends() -> None:
    rules = tuple(DtypeRule(f"{number:01000}", "") for number in range(1100))
    too_large = p.Load("/m", rules, 0.0)
    with pytest.raises(MessageTooLarge):
        p.pack_request(too_large, 1)
    with pytest.raises(MessageTooLarge):
        p.read_request(p.pack(too_large, 1)[1])


def test_text_or_numbers_that_msgpack_cannot_hold_are_refused_when_packing() -> None:
    with pytest.raises(MalformedMessage):
        p.pack(p.ShowModel("\ud800"), 1)
    with pytest.raises(MalformedMessage):
        p.pack(p.Detach("c", 1 << 64), 1)


def test_each_socket_has_its_own_messages() -> None:
    with pytest.raises(MalformedMessage):
        p.read_request(p.pack(p.Redeem(b""), 1)[1])
    for message in (p.Shutdown(), p.HandedOver(0, 1)):
        with pytest.raises(MalformedMessage):
            p.read_redeem(p.pack(message, 1)[1])
    for message in (p.Done(), p.Redeem(b"")):
        with pytest.raises(MalformedMessage):
            p.read_handed(p.pack(message, 1)[1])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_never_worse_than_malformed(data: bytes) -> None:
    for reader in (p.read_header, p.read_request, p.read_reply, p.read_event, p.read_redeem, p.read_handed):
        try:
            reader(data)
        except LunashmError as exc:
            assert isinstance(exc, MalformedMessage | ProtocolMismatch)


@given(st.sampled_from(messages.ALL), st.data())
def test_damaged_message_is_read_or_malformed(message: p.Message, data: st.DataObject) -> None:
    body = bytearray(p.pack(message, 1)[1])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedMessage):
        assert isinstance(read(message, bytes(body)), p.Message)


# -- the specification -------------------------------------------------------------------------------------------------


def test_specification_states_the_version() -> None:
    assert re.findall(r"^Protocol version: (\d+)$", SPECIFICATION, re.MULTILINE) == [str(p.PROTOCOL_VERSION)]


RECORDS = [
    p.HostInfo, p.ClientInfo, p.ClientStatus, p.LeaseInfo, p.ModelInfo, p.Handle,
    Manifest, TensorSpec, Source, DtypeRule,
]  # fmt: skip


@pytest.mark.parametrize("cls", [*message_types(), *RECORDS], ids=lambda cls: cls.__name__)
def test_specification_has_every_message_with_all_its_fields_in_order(cls: type[msgspec.Struct]) -> None:
    section = re.search(rf"^#### {cls.__name__}$(.*?)(?=^#|\Z)", SPECIFICATION, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE) == list(cls.__struct_fields__)


@pytest.mark.parametrize("code", BY_CODE)
def test_specification_has_every_error_code(code: str) -> None:
    assert f"| `{code}` |" in SPECIFICATION


@pytest.mark.parametrize("limit", [p.MAX_REQUEST_BYTES, p.MAX_FRAME_BYTES, p.MAX_DATAGRAM_BYTES])
def test_specification_has_every_limit(limit: int) -> None:
    assert f"{limit:,}" in SPECIFICATION

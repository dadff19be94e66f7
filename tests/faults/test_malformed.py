"""No message ends the host but Shutdown: a storm of damaged, misplaced and meaningless ones against a real process."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from lunashm import protocol as p
from lunashm.client import Session
from tests import checkpoints, messages
from tests.host_process import HostProcess

STORM = 3_000
HARMLESS = [m for m in messages.REQUESTS if not isinstance(m, p.Shutdown | p.Register)]


def storm(seed: int) -> Iterator[list[bytes]]:
    chance = random.Random(seed)
    for number in range(STORM):
        header, body = p.pack(chance.choice(HARMLESS), number)
        match chance.randrange(6):
            case 0:  # a request out of order, or about nothing
                yield [header, body]
            case 1:  # damaged bytes; not such as could spell Shutdown or Register
                damaged = bytearray(body)
                for _ in range(chance.randint(1, 4)):
                    damaged[chance.randrange(len(damaged))] = chance.randrange(256)
                yield [header, bytes(damaged)]
            case 2:
                yield [chance.randbytes(14), body]
            case 3:
                yield [header, chance.randbytes(chance.randrange(300))]
            case 4:
                yield [chance.randbytes(chance.randrange(20)) for _ in range(chance.randrange(1, 6))]
            case 5:
                yield [header, msgspec.msgpack.encode({"type": "Attach", "client": None, "path": [], "rules": {}})]


@pytest.mark.parametrize("seed", [1, 2])
def test_host_survives_a_storm_and_serves_its_clients_through_it(host: HostProcess, seed: int) -> None:
    path = host.models / "storm.safetensors"
    checkpoints.write(path)
    session = Session(host.endpoint, kind="test", label="")
    held = session.attach(str(path), (), 60.0)
    before = host.status()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDTIMEO, 10_000)
        dealer.setsockopt(zmq.RCVTIMEO, 10_000)
        dealer.connect(host.endpoint.url)
        for frames in storm(seed):
            dealer.send_multipart(frames)
            while dealer.poll(0):
                dealer.recv_multipart()
        dealer.send_multipart(p.pack(p.GetStatus(), 1 << 40))
        while p.peek_id(dealer.recv_multipart()[0]) != 1 << 40:  # one that does not read loses replies
            pass
    after = host.status()
    assert after.host.host_id == before.host.host_id
    assert (after.leases, after.clients) == (1, before.clients)
    assert after.counters["error.malformed_message"] > before.counters.get("error.malformed_message", 0)
    assert after.counters["dropped.frames"] > before.counters.get("dropped.frames", 0)
    assert after.counters.get("error.internal", 0) == 0, host.log()
    del held
    session.close()

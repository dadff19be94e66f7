"""Tickets as the service issues and ends them, with the leases they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lunashm import protocol as p
from lunashm.errors import TicketRefused
from lunashm.host.tickets import TICKET_S
from lunashm.memory.memfd import MemfdRung
from tests.host.test_service import Bench
from tests.messages import CLIENT


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path, rung=MemfdRung())  # type: ignore[arg-type] - real memory in place of the fake
    yield bench
    bench.service.close()


def test_memory_that_handles_name_needs_no_ticket(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.attach(bench.client(), bench.file()).ticket == b""


def test_ticket_brings_one_descriptor_per_handle_which_stays_the_hosts(bench: Bench) -> None:
    reply = bench.attach(bench.client(), bench.file())
    (descriptor,) = bench.service.redeem(reply.ticket, CLIENT.pid)
    assert len(reply.handles) == 1
    assert os.fstat(descriptor).st_size == reply.handles[0].nbytes
    assert bench.rung.open(reply.handles[0], descriptor).handle == reply.handles[0]


def test_ticket_is_good_in_the_process_that_registered_alone(bench: Bench) -> None:
    ticket = bench.attach(bench.client(), bench.file()).ticket
    with pytest.raises(TicketRefused, match="attach in the process"):
        bench.service.redeem(ticket, CLIENT.pid + 1)
    bench.service.redeem(ticket, CLIENT.pid)


def test_ticket_of_a_client_in_another_pid_namespace_is_good_from_there(bench: Bench) -> None:
    ticket = bench.attach(bench.client(watched=False), bench.file()).ticket
    bench.service.redeem(ticket, 0)


ENDS: dict[str, Callable[[Bench, str, p.Attached], object]] = {
    "detached": lambda bench, client, reply: bench.ask(p.Detach(client, reply.lease), p.Done),
    "left": lambda bench, client, reply: bench.ask(p.Unregister(client), p.Done),
    "died": lambda bench, client, reply: bench.service.drop_client(client, "process ended"),
    "too late": lambda bench, client, reply: (bench.clock.advance(TICKET_S + 1), bench.service.tick()),
    "used": lambda bench, client, reply: bench.service.redeem(reply.ticket, CLIENT.pid),
    "host stops": lambda bench, client, reply: bench.service.close(),
}


@pytest.mark.parametrize("how", ENDS)
def test_ticket_ends_with_its_lease_its_time_or_its_use(bench: Bench, how: str) -> None:
    client = bench.client()
    reply = bench.attach(client, bench.file())
    assert len(bench.service._tickets) == 1
    ENDS[how](bench, client, reply)
    assert len(bench.service._tickets) == 0
    with pytest.raises(TicketRefused, match="attach again"):
        bench.service.redeem(reply.ticket, CLIENT.pid)


def test_ticket_that_nobody_heard_of_ends(bench: Bench) -> None:
    client, path = bench.client(), bench.file()
    bench.outbox.deaf.add(b"gone")
    bench.send(p.Attach(client, path, (), 60.0), b"gone")
    bench.work()
    assert len(bench.service._tickets) == 0


def test_lease_of_a_model_that_drains_can_still_be_redeemed(bench: Bench) -> None:
    reply = bench.attach(bench.client(), bench.file())
    assert not bench.ask(p.Unload("m.safetensors", True), p.Unloaded).freed
    (descriptor,) = bench.service.redeem(reply.ticket, CLIENT.pid)
    bench.rung.open(reply.handles[0], descriptor)

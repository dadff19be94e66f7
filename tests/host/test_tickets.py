from __future__ import annotations

import pytest

from lunashm.errors import TicketRefused
from lunashm.host.tickets import TICKET_S, Tickets
from lunashm.memory import Segment
from tests.fakes import FakeClock, HeapRung

OWNER, OTHER = 777, 778


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def tickets(clock: FakeClock) -> Tickets:
    return Tickets(clock)


@pytest.fixture
def segments() -> tuple[Segment, ...]:
    rung = HeapRung()
    return rung.allocate(10), rung.allocate(10)


def test_ticket_is_good_once(tickets: Tickets, segments: tuple[Segment, ...]) -> None:
    ticket = tickets.issue(41, segments, OWNER)
    assert tickets.redeem(ticket, OWNER) is segments
    with pytest.raises(TicketRefused, match="attach again"):
        tickets.redeem(ticket, OWNER)
    assert len(tickets) == 0


def test_tickets_cannot_be_guessed_from_each_other(tickets: Tickets, segments: tuple[Segment, ...]) -> None:
    issued = {tickets.issue(lease, segments, OWNER) for lease in range(100)}
    assert len(issued) == 100
    assert {len(ticket) for ticket in issued} == {32}


@pytest.mark.parametrize("forged", [b"", b"\0" * 32, b"x" * 3000])
def test_forged_ticket_is_refused_and_harms_none(
    tickets: Tickets, segments: tuple[Segment, ...], forged: bytes
) -> None:
    ticket = tickets.issue(41, segments, OWNER)
    for wrong in (forged, ticket[:-1], ticket + b"\0"):
        with pytest.raises(TicketRefused, match="attach again"):
            tickets.redeem(wrong, OWNER)
    assert tickets.redeem(ticket, OWNER) is segments


def test_refused_attempt_of_another_process_leaves_the_ticket_to_its_owner(
    tickets: Tickets, segments: tuple[Segment, ...]
) -> None:
    ticket = tickets.issue(41, segments, OWNER)
    for stranger in (OTHER, 0, -1):
        with pytest.raises(TicketRefused, match=f"pid {OWNER}'s, not pid {stranger}'s; attach in the process"):
            tickets.redeem(ticket, stranger)
    assert tickets.redeem(ticket, OWNER) is segments


def test_ticket_of_a_client_that_cannot_be_seen_is_good_in_any_process(
    tickets: Tickets, segments: tuple[Segment, ...]
) -> None:
    assert tickets.redeem(tickets.issue(41, segments, None), 0) is segments


def test_ticket_is_good_for_its_time_and_not_longer(
    tickets: Tickets, segments: tuple[Segment, ...], clock: FakeClock
) -> None:
    first, second = tickets.issue(41, segments, OWNER), tickets.issue(42, segments, OWNER)
    clock.advance(TICKET_S)
    tickets.expire()
    assert tickets.redeem(first, OWNER) is segments
    clock.advance(0.5)
    with pytest.raises(TicketRefused, match="lease 42 is 30 s old, it was good for 30 s; attach again"):
        tickets.redeem(second, OWNER)


def test_what_is_too_old_is_forgotten(tickets: Tickets, segments: tuple[Segment, ...], clock: FakeClock) -> None:
    tickets.issue(41, segments, OWNER)
    clock.advance(TICKET_S - 1)
    young = tickets.issue(42, segments, OWNER)
    clock.advance(2)
    tickets.expire()
    assert len(tickets) == 1
    assert tickets.redeem(young, OWNER) is segments


def test_ticket_dies_with_its_lease_and_with_no_other(tickets: Tickets, segments: tuple[Segment, ...]) -> None:
    first, second = tickets.issue(41, segments, OWNER), tickets.issue(42, segments, OWNER)
    tickets.cancel(41)
    tickets.cancel(40)
    with pytest.raises(TicketRefused):
        tickets.redeem(first, OWNER)
    assert tickets.redeem(second, OWNER) is segments


def test_all_tickets_can_be_voided_at_once(tickets: Tickets, segments: tuple[Segment, ...]) -> None:
    ticket = tickets.issue(41, segments, OWNER)
    tickets.clear()
    with pytest.raises(TicketRefused):
        tickets.redeem(ticket, OWNER)

from __future__ import annotations

import pytest

from lunashm.errors import LeaseUnknown, NotRegistered
from lunashm.host.leases import LeaseTable
from tests.fakes import FakeClock
from tests.messages import CLIENT


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def table(clock: FakeClock) -> LeaseTable:
    return LeaseTable(15.0, clock)


def test_clients_have_ids_that_cannot_be_guessed_from_each_other(table: LeaseTable) -> None:
    ids = {table.register(CLIENT, watched=True).id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(client_id) == 16 for client_id in ids)


def test_lease_is_released_once(table: LeaseTable) -> None:
    client = table.register(CLIENT, watched=True)
    lease = table.grant(client.id, generation=3)
    assert (len(table), lease.generation) == (1, 3)
    assert table.release(client.id, lease.id) == lease
    with pytest.raises(LeaseUnknown):
        table.release(client.id, lease.id)
    assert len(table) == 0


def test_lease_of_another_client_cannot_be_released(table: LeaseTable) -> None:
    owner, other = (table.register(CLIENT, watched=True) for _ in range(2))
    lease = table.grant(owner.id, 1)
    with pytest.raises(LeaseUnknown):
        table.release(other.id, lease.id)
    assert table.of_generation(1) == [(owner, lease)]


def test_nothing_is_granted_to_a_client_that_is_not_registered(table: LeaseTable) -> None:
    with pytest.raises(NotRegistered):
        table.grant("nobody", 1)
    with pytest.raises(NotRegistered):
        table.release("nobody", 1)
    with pytest.raises(NotRegistered):
        table.renew("nobody")


def test_dropped_client_takes_its_leases_with_it(table: LeaseTable) -> None:
    client = table.register(CLIENT, watched=True)
    leases = {table.grant(client.id, 1).id for _ in range(2)}
    dropped = table.drop(client.id)
    assert dropped is not None
    assert set(dropped.leases) == leases
    assert (len(table), table.clients, table.drop(client.id)) == (0, [], None)


def test_lease_can_be_revoked_without_knowing_its_client(table: LeaseTable) -> None:
    lease = table.grant(table.register(CLIENT, watched=True).id, 1)
    assert table.revoke(lease.id) == lease
    assert table.revoke(lease.id) is None


def test_unwatched_client_is_silent_after_the_ttl_and_not_before(table: LeaseTable, clock: FakeClock) -> None:
    client = table.register(CLIENT, watched=False)
    clock.advance(15.0)
    assert table.silent() == []
    clock.advance(0.1)
    assert table.silent() == [client]


def test_every_sign_of_life_counts(table: LeaseTable, clock: FakeClock) -> None:
    client = table.register(CLIENT, watched=False)
    lease = table.grant(client.id, 1)
    for sign in (lambda: table.renew(client.id), lambda: table.release(client.id, lease.id)):
        clock.advance(14.0)
        sign()
        clock.advance(14.0)
        assert table.silent() == []
    assert client.last_seen == clock.now - 14.0


def test_watched_client_may_be_silent_for_ever(table: LeaseTable, clock: FakeClock) -> None:
    table.register(CLIENT, watched=True)
    clock.advance(1e9)
    assert table.silent() == []

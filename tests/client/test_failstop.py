"""Memory that dies with its host (cuda-ipc), shown with shared memory that is said to: its next use raises."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lunashm import protocol as p
from lunashm.client import Attachment, Session
from lunashm.client import session as session_module
from lunashm.errors import HostLost, SharedMemoryError
from lunashm.manifest import DtypeRule
from lunashm.memory.posix import PosixRung
from tests import checkpoints
from tests.host_process import HostProcess
from tests.hosting import Hosting
from tests.waiting import until

AS_STORED = (DtypeRule("", ""),)


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    hosting = Hosting(tmp_path, rung=PosixRung())
    hosting.start()
    yield hosting
    gc.collect()
    if hosting.running:
        hosting.stop()


def leases(hosting: Hosting) -> int:
    with hosting.client() as client:
        reply = client.request(p.GetStatus())
        assert isinstance(reply, p.Status)
        return reply.leases


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory counts as memory that dies with its host, as that of cuda-ipc does."""
    monkeypatch.setattr(PosixRung, "outlives_host", False)


def test_host_is_watched_from_before_its_memory_is_mapped(
    session: Session, path: Path, mortal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    watch, open_ = session_module.HostWatch.__init__, PosixRung.open
    monkeypatch.setattr(session_module.HostWatch, "__init__", lambda *a: (order.append("watch"), watch(*a))[1])
    monkeypatch.setattr(PosixRung, "open", lambda *a: (order.append("open"), open_(*a))[1])
    assert session.attach(str(path), AS_STORED, 60.0).watch is not None
    assert order == ["watch", "open"]


def test_memory_that_outlives_its_host_needs_no_watch(session: Session, path: Path) -> None:
    assert session.attach(str(path), AS_STORED, 60.0).watch is None


def test_host_that_cannot_be_watched_is_not_trusted(
    hosting: Hosting, session: Session, path: Path, mortal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunashm.client.watch.pidfd_of", lambda pid, namespace: None)
    with pytest.raises(SharedMemoryError, match="cannot be watched"):
        session.attach(str(path), AS_STORED, 60.0)
    until(lambda: leases(hosting) == 0, "the lease is given back")


def test_listeners_hear_of_a_host_that_went_without_a_word(runtime: Path, own_host: HostProcess) -> None:
    session = Session(own_host.endpoint, kind="test", label="")
    heard: list[p.Event] = []
    session.listen(heard.append)
    host = session.connect()
    own_host.kill()
    until(lambda: p.HostStopping(host.host_id, "it is gone") in heard, "the end is told")


def test_lease_of_a_process_that_leaves_stays_until_it_is_gone(
    hosting: Hosting, session: Session, path: Path, mortal: None
) -> None:
    """The memory may still be mapped and read: the host must not free it before it sees the process end."""
    lent = session.attach(str(path), AS_STORED, 60.0)
    session.close()
    assert leases(hosting) == 1
    assert lent.watch is not None
    lent.watch.check()


# -- an attachment to it -----------------------------------------------------------------------------------------------


@pytest.fixture
def attached(own_host: HostProcess, mortal: None) -> Iterator[Attachment]:
    path = own_host.models / "m.safetensors"
    checkpoints.write(path, {"weight": ("F32", (4, 4)), "bias": ("F32", (4,))})
    session = Session(own_host.endpoint, kind="test", label="")
    attachment = Attachment.open(session, str(path), AS_STORED, 60.0)
    yield attachment
    attachment.close()
    gc.collect()
    session.close()


def test_next_use_after_the_hosts_death_raises(attached: Attachment, own_host: HostProcess) -> None:
    assert attached.fail_stop
    assert not attached.lost
    attached.check()
    own_host.kill()
    assert attached.lost
    for use in (attached.check, attached.state_dict, attached.checksum):
        with pytest.raises(HostLost, match="not to be trusted; attach again"):
            use()


def test_next_use_after_the_host_stopped_raises(attached: Attachment, own_host: HostProcess) -> None:
    assert own_host.stop() == 0
    with pytest.raises(HostLost):
        attached.state_dict()


def test_module_that_is_called_after_the_hosts_death_raises(attached: Attachment, own_host: HostProcess) -> None:
    layer = torch.nn.Linear(4, 4)
    attached.load_into(layer)
    private = copy.deepcopy(layer)
    expected = layer(torch.ones(4))
    own_host.kill()
    with pytest.raises(HostLost):
        layer(torch.ones(4))
    assert torch.equal(private(torch.ones(4)), expected), "a copy has weights of its own"


def test_next_host_lends_the_same_bytes(attached: Attachment, own_host: HostProcess) -> None:
    before = attached.checksum()
    own_host.kill()
    own_host.start()
    again = attached.reattached(60.0)
    assert again.checksum() == before
    assert attached.lost
    again.close()


def test_memory_that_outlives_its_host_is_never_lost(hosting: Hosting, session: Session, path: Path) -> None:
    attachment = Attachment.open(session, str(path), AS_STORED, 60.0)
    assert not attachment.fail_stop
    hosting.stop()
    attachment.check()
    assert not attachment.lost
    assert attachment.state_dict()

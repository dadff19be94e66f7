"""Requests in, replies and events out; time and work happen when the test says so."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TypeVar

import pytest

from lunashm import protocol as p
from lunashm.errors import LunashmError, SettingsError
from lunashm.host import checkpoint
from lunashm.host.service import Service
from lunashm.manifest import DtypeRule
from tests import checkpoints
from tests.fakes import FakeClock, FakeOutbox, HeapRung, Worker
from tests.messages import CLIENT

AS_STORED = (DtypeRule("", ""),)
AS_F16 = (DtypeRule("", "F16"),)
AS_F32 = (DtypeRule("", "F32"),)

_M = TypeVar("_M", bound=p.Message)


class Bench:
    """A service with everything around it, and short words for what tests do."""

    def __init__(self, root: Path, rung: HeapRung | None = None) -> None:
        self.root = root
        self.clock = FakeClock()
        self.outbox = FakeOutbox()
        self.worker = Worker()
        self.rung = rung or HeapRung()
        self.service = Service(
            rung=self.rung, roots=(str(root),), endpoint="ipc:///run/cpu.sock", ttl_s=15.0, outbox=self.outbox,
            submit=self.worker.submit, clock=self.clock,
        )  # fmt: skip
        self._ids = itertools.count(1)

    def file(self, name: str = "m.safetensors", seed: int = 0, tensors: checkpoints.Tensors = checkpoints.SMALL) -> str:
        checkpoints.write(self.root / name, tensors, seed=seed)
        return str(self.root / name)

    def client(self, watched: bool = True) -> str:
        return self.service.register(CLIENT, watched)[0].id

    def send(self, request: p.Request, route: bytes = b"r") -> int:
        number = next(self._ids)
        self.service.handle(route, number, request)
        return number

    def answer(self, number: int) -> p.Message | None:
        """The one reply to a request; None while it waits."""
        replies = [message for _, message_id, message in self.outbox.replies if message_id == number]
        assert len(replies) <= 1, "answered twice"
        return replies[0] if replies else None

    def ask(self, request: p.Request, kind: type[_M]) -> _M:
        answer = self.answer(self.send(request))
        assert isinstance(answer, kind), answer
        return answer

    def refused(self, request: p.Request) -> str:
        return self.ask(request, p.ErrorReply).code

    def work(self) -> int:
        return self.worker.run(self.service, self.rung)

    def attach(self, client: str, path: str, rules: tuple[DtypeRule, ...] = AS_STORED) -> p.Attached:
        number = self.send(p.Attach(client, path, rules, 60.0))
        self.work()
        answer = self.answer(number)
        assert isinstance(answer, p.Attached), answer
        return answer

    def models(self) -> tuple[p.ModelInfo, ...]:
        return self.ask(p.ListModels(), p.Models).models

    def events(self, kind: type[_M]) -> list[_M]:
        return [event for event in self.outbox.events if isinstance(event, kind)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# -- registering -------------------------------------------------------------------------------------------------------


def test_registered_client_is_told_who_hosts_and_when_to_renew(bench: Bench) -> None:
    _, reply = bench.service.register(CLIENT, watched=True)
    assert reply.host == bench.service.info
    assert (reply.ttl_s, reply.renew_every_s) == (15.0, 5.0)
    assert bench.events(p.ClientJoined) == [p.ClientJoined(reply.client, CLIENT)]


def test_requests_before_registering_are_refused(bench: Bench) -> None:
    path = bench.file()
    for request in (p.Renew("nobody"), p.Attach("nobody", path, (), 1.0), p.Detach("nobody", 1)):
        assert bench.refused(request) == "not_registered"
    assert bench.worker.jobs == []  # nothing is loaded for a stranger
    bench.ask(p.Unregister("nobody"), p.Done)


def test_client_that_leaves_ends_its_leases(bench: Bench) -> None:
    client = bench.client()
    bench.attach(client, bench.file())
    bench.ask(p.Unregister(client), p.Done)
    assert bench.service.status().leases == 0
    assert [event.reason for event in bench.events(p.ClientLeft)] == ["left"]
    assert bench.refused(p.Renew(client)) == "not_registered"


# -- loading -----------------------------------------------------------------------------------------------------------


def test_first_attach_waits_for_the_load_and_then_gets_all_of_it(bench: Bench) -> None:
    path = bench.file()
    number = bench.send(p.Attach(bench.client(), path, AS_STORED, 60.0))
    assert bench.answer(number) is None
    assert [model.state for model in bench.models()] == ["loading"]
    bench.work()
    reply = bench.answer(number)
    assert isinstance(reply, p.Attached)
    assert {spec.name for spec in reply.manifest.tensors} == set(checkpoints.SMALL)
    assert [handle.nbytes for handle in reply.handles] == list(reply.manifest.segments)
    assert reply.manifest.source == checkpoint.identify(Path(path))


def test_two_requests_at_once_load_once(bench: Bench) -> None:
    path, clients = bench.file(), [bench.client(), bench.client()]
    numbers = [bench.send(p.Attach(client, path, AS_STORED, 60.0)) for client in clients]
    numbers.append(bench.send(p.Load(path, AS_STORED, 60.0)))
    assert bench.work() == 1
    replies = [bench.answer(number) for number in numbers]
    assert [type(reply) for reply in replies] == [p.Attached, p.Attached, p.Loaded]
    assert len(bench.rung.segments) == 1
    assert bench.work() == 0


def test_request_that_the_running_load_will_satisfy_waits_for_it(bench: Bench) -> None:
    path, client = bench.file(tensors={"a": ("F16", (4,)), "ids": ("I64", (2,))}), bench.client()
    useful = (AS_STORED, AS_F16, *((DtypeRule(*rule),) for rule in (("a", "F16"), ("other.", "F32"), ("ids", "F32"))))
    numbers = [bench.send(p.Attach(client, path, rules, 60.0)) for rules in useful]
    assert bench.work() == 1
    assert all(isinstance(bench.answer(number), p.Attached) for number in numbers)


def test_request_for_other_dtypes_loads_a_variant_of_its_own(bench: Bench) -> None:
    path, client = bench.file(), bench.client()
    numbers = [bench.send(p.Attach(client, path, rules, 60.0)) for rules in (AS_STORED, AS_F16)]
    assert bench.work() == 2
    stored, half = (bench.answer(number) for number in numbers)
    assert isinstance(stored, p.Attached)
    assert isinstance(half, p.Attached)
    assert stored.manifest.digest == half.manifest.digest
    assert {spec.dtype for spec in half.manifest.tensors} == {"F16"}
    assert {spec.stored for spec in half.manifest.tensors} == {"F32", "BF16"}
    assert stored.handles != half.handles


def test_variant_of_a_loaded_file_is_loaded_once_and_at_once(bench: Bench) -> None:
    """Its digest is known already: looking for it first would go round in circles."""
    path, client = bench.file(), bench.client()
    bench.attach(client, path)
    number = bench.send(p.Attach(client, path, AS_F16, 60.0))
    assert bench.work() == 1
    assert isinstance(bench.answer(number), p.Attached)
    assert len(bench.rung.segments) == 2


def test_load_says_whether_it_was_loaded_before(bench: Bench) -> None:
    path = bench.file()
    number = bench.send(p.Load(path, AS_STORED, 60.0))
    bench.work()
    first = bench.answer(number)
    assert isinstance(first, p.Loaded)
    assert not first.was_loaded
    assert bench.ask(p.Load(path, AS_STORED, 0.0), p.Loaded).was_loaded


def test_who_does_not_want_to_wait_is_told_so_while_it_loads(bench: Bench) -> None:
    path, client = bench.file(), bench.client()
    assert bench.refused(p.Attach(client, path, AS_STORED, 0.0)) == "model_not_ready"
    assert bench.refused(p.Attach(client, path, AS_STORED, 0.0)) == "model_not_ready"
    assert bench.work() == 1
    bench.ask(p.Attach(client, path, AS_STORED, 0.0), p.Attached)


def test_failed_load_answers_everybody_and_can_be_tried_again(bench: Bench) -> None:
    bench.rung.size = 10
    path, client = bench.file(), bench.client()
    numbers = [bench.send(p.Attach(client, path, AS_STORED, 60.0)) for _ in range(3)]
    bench.work()
    replies = [bench.answer(number) for number in numbers]
    assert all(isinstance(reply, p.ErrorReply) and reply.code == "out_of_shared_memory" for reply in replies)
    assert [event.code for event in bench.events(p.LoadFailed)] == ["out_of_shared_memory"]
    assert bench.rung.segments == {}
    bench.rung.size = 1 << 20
    bench.attach(client, path)


def test_load_that_fails_in_an_unforeseen_way_answers_everybody(bench: Bench) -> None:
    number = bench.send(p.Load(bench.file(), AS_STORED, 60.0))
    bench.service.finish(bench.worker.jobs.pop(), ZeroDivisionError("surprise"))
    reply = bench.answer(number)
    assert isinstance(reply, p.ErrorReply)
    assert reply.code == "internal"
    assert "surprise" in reply.message


def test_surprise_while_admitting_a_load_answers_everybody_and_frees_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [bench.send(p.Load(bench.file(), AS_STORED, 60.0)) for _ in range(2)]
    monkeypatch.setattr(bench.service._catalog, "learn", lambda *args: 1 / 0)
    bench.work()
    assert all(isinstance(bench.answer(number), p.ErrorReply) for number in numbers)
    assert bench.rung.segments == {}
    assert bench.models() == ()


def test_broken_file_is_refused_before_anyone_waits(bench: Bench) -> None:
    (bench.root / "bad.safetensors").write_bytes(b"12345678garbage")
    for wait_s in (60.0, 0.0):
        assert bench.refused(p.Load(str(bench.root / "bad.safetensors"), AS_STORED, wait_s)) == "invalid_checkpoint"
    assert bench.worker.jobs == []


@pytest.mark.parametrize(
    ("name", "code"),
    [("/etc/hostname", "path_not_allowed"), ("m.ckpt", "unsupported_format"), ("missing.sft", "model_not_found")],
)
def test_file_that_may_not_be_served_is_refused(bench: Bench, name: str, code: str) -> None:
    assert bench.refused(p.Load(str(bench.root / name), AS_STORED, 60.0)) == code


def test_rules_that_make_no_sense_are_refused(bench: Bench) -> None:
    path = bench.file()
    assert bench.refused(p.Load(path, (DtypeRule("", "I64"),), 60.0)) == "unsupported_format"
    assert bench.refused(p.Load(path, (DtypeRule("a", "F16"), DtypeRule("a", "F32")), 60.0)) == "unsupported_format"


def test_wait_ends_at_its_deadline_and_the_load_goes_on(bench: Bench) -> None:
    path = bench.file()
    short, long = (bench.send(p.Load(path, AS_STORED, wait_s)) for wait_s in (5.0, float("inf")))
    bench.clock.advance(4.9)
    bench.service.tick()
    assert bench.answer(short) is None
    bench.clock.advance(0.1)
    bench.service.tick()
    reply = bench.answer(short)
    assert isinstance(reply, p.ErrorReply)
    assert reply.code == "load_timeout"
    bench.clock.advance(1e9)
    bench.service.tick()
    assert bench.answer(long) is None
    bench.work()
    assert isinstance(bench.answer(long), p.Loaded)


def test_progress_is_told_while_it_loads_and_not_too_often(bench: Bench) -> None:
    path = bench.file()
    bench.send(p.Load(path, AS_STORED, 60.0))
    assert bench.service.busy
    for _ in range(10):
        bench.service.tick()
    assert len(bench.events(p.LoadProgress)) == 1
    bench.clock.advance(0.5)
    bench.service.tick()
    progress = bench.events(p.LoadProgress)[-1]
    assert (progress.path, progress.total, progress.elapsed_s) == (path, Path(path).stat().st_size, 0.5)
    bench.work()
    assert not bench.service.busy


# -- files that change -------------------------------------------------------------------------------------------------


def test_changed_file_is_a_new_generation_and_the_old_one_stays_with_its_clients(bench: Bench) -> None:
    path, client = bench.file(seed=1), bench.client()
    old = bench.attach(client, path)
    bench.file(seed=2)
    checkpoints.touch(Path(path))
    new = bench.attach(client, path)
    assert new.manifest.generation > old.manifest.generation
    assert new.manifest.digest != old.manifest.digest
    assert {model.generation: model.state for model in bench.models()} == {1: "draining", 2: "ready"}
    bench.rung.open(old.handles[0])
    bench.ask(p.Detach(client, old.lease), p.Done)
    assert [model.generation for model in bench.models()] == [2]
    assert len(bench.rung.segments) == 1


def test_changed_file_that_nobody_holds_makes_room_for_its_successor(bench: Bench) -> None:
    path, client = bench.file(tensors={"a": ("U8", (600,))}), bench.client()
    bench.rung.size = 1000
    bench.ask(p.Detach(client, bench.attach(client, path).lease), p.Done)
    bench.file(tensors={"a": ("U8", (700,))})
    bench.attach(client, path)
    assert len(bench.models()) == 1


def test_touched_file_is_recognised_by_its_bytes_and_not_loaded_again(bench: Bench) -> None:
    path, client = bench.file(), bench.client()
    first = bench.attach(client, path)
    allocated = bench.rung._ids.__reduce__()
    checkpoints.touch(Path(path))
    second = bench.attach(client, path)
    assert bench.rung._ids.__reduce__() == allocated  # not even for a moment
    assert second.handles == first.handles
    assert second.manifest.source == checkpoint.identify(Path(path)) != first.manifest.source
    assert len(bench.models()) == 1
    bench.attach(client, path)
    assert bench.work() == 0


def test_touched_file_in_two_dtypes_is_recognised_for_both(bench: Bench) -> None:
    path, client = bench.file(), bench.client()
    before = [bench.attach(client, path, rules).handles for rules in (AS_STORED, AS_F16)]
    checkpoints.touch(Path(path))
    after = [bench.attach(client, path, rules).handles for rules in (AS_STORED, AS_F16)]
    assert before == after


def test_touched_file_wanted_in_new_dtypes_is_converted_once(bench: Bench) -> None:
    path, client = bench.file(), bench.client()
    bench.attach(client, path)
    checkpoints.touch(Path(path))
    number = bench.send(p.Attach(client, path, AS_F16, 60.0))
    assert bench.work() == 2  # it is recognised, then converted
    assert isinstance(bench.answer(number), p.Attached)
    assert len(bench.rung.segments) == 2


def test_two_files_with_the_same_bytes_share_one_copy(bench: Bench) -> None:
    client = bench.client()
    first = bench.attach(client, bench.file("a.safetensors"))
    allocated = bench.rung._ids.__reduce__()
    copy = bench.file("copy.safetensors")
    second = bench.attach(client, copy)
    assert second.handles == first.handles
    assert second.manifest.source.path == copy
    assert bench.rung._ids.__reduce__() == allocated
    assert len(bench.models()) == 1


def test_two_files_with_the_same_bytes_loaded_at_once_end_up_as_one(bench: Bench) -> None:
    client = bench.client()
    numbers = [bench.send(p.Attach(client, bench.file(name), AS_STORED, 60.0)) for name in ("a.sft", "b.sft")]
    assert bench.work() == 2
    replies = [bench.answer(number) for number in numbers]
    assert isinstance(replies[0], p.Attached)
    assert isinstance(replies[1], p.Attached)
    assert replies[0].handles == replies[1].handles
    assert len(bench.rung.segments) == 1


def test_same_size_and_other_bytes_are_another_model(bench: Bench) -> None:
    client = bench.client()
    first = bench.attach(client, bench.file("a.safetensors", seed=1))
    second = bench.attach(client, bench.file("b.safetensors", seed=2))
    assert first.handles != second.handles
    assert len(bench.models()) == 2


def test_known_bytes_that_are_unloaded_while_they_are_recognised_are_loaded(bench: Bench) -> None:
    path, client = bench.file("a.safetensors"), bench.client()
    bench.ask(p.Detach(client, bench.attach(client, path).lease), p.Done)
    number = bench.send(p.Attach(client, bench.file("copy.safetensors"), AS_STORED, 60.0))
    job = bench.worker.jobs.pop()
    recognised = job.run(bench.rung)
    assert recognised.loaded is None
    bench.ask(p.Unload("a.safetensors", False), p.Unloaded)
    bench.service.finish(job, recognised)
    assert bench.work() == 1
    assert isinstance(bench.answer(number), p.Attached)


def test_file_that_changes_between_load_and_answer_is_loaded_again(bench: Bench) -> None:
    path, client = bench.file(seed=1), bench.client()
    number = bench.send(p.Attach(client, path, AS_STORED, 60.0))
    job = bench.worker.jobs.pop()
    outcome = job.run(bench.rung)
    bench.file(seed=2)
    checkpoints.touch(Path(path))
    bench.service.finish(job, outcome)
    assert bench.answer(number) is None
    bench.work()
    reply = bench.answer(number)
    assert isinstance(reply, p.Attached)
    assert reply.manifest.source == checkpoint.identify(Path(path))
    assert len(bench.rung.segments) == 1


# -- unloading ---------------------------------------------------------------------------------------------------------


def test_model_in_use_is_not_unloaded_and_its_holders_are_named(bench: Bench) -> None:
    bench.attach(bench.client(), bench.file())
    reply = bench.ask(p.Unload("m.safetensors", False), p.ErrorReply)
    assert reply.code == "model_in_use"
    assert "ComfyUI :8188 (pid 777)" in reply.message


def test_unused_model_is_unloaded_and_its_memory_freed(bench: Bench) -> None:
    client = bench.client()
    lease = bench.attach(client, bench.file()).lease
    bench.ask(p.Detach(client, lease), p.Done)
    assert len(bench.models()) == 1  # it stays for the next client
    assert bench.ask(p.Unload("m.safetensors", False), p.Unloaded).freed
    assert bench.rung.segments == {}
    assert [event.generation for event in bench.events(p.ModelFreed)] == [1]


def test_forced_unload_asks_holders_and_frees_when_the_last_lets_go(bench: Bench) -> None:
    clients = [bench.client(), bench.client()]
    leases = [bench.attach(client, bench.file()).lease for client in clients]
    reply = bench.ask(p.Unload("m.safetensors", True), p.Unloaded)
    assert not reply.freed
    assert {info.client for info in reply.told} == set(clients)
    assert bench.events(p.UnloadRequested) == [p.UnloadRequested("m.safetensors", 1)]
    bench.ask(p.Detach(clients[0], leases[0]), p.Done)
    assert len(bench.rung.segments) == 1
    bench.ask(p.Detach(clients[1], leases[1]), p.Done)
    assert bench.rung.segments == {}


def test_unloading_what_is_being_loaded_cancels_it_at_once(bench: Bench) -> None:
    path = bench.file()
    numbers = [bench.send(p.Load(path, AS_STORED, 60.0)) for _ in range(2)]
    assert bench.ask(p.Unload("m.safetensors", False), p.Unloaded).model.state == "loading"
    replies = [bench.answer(number) for number in numbers]
    assert all(isinstance(reply, p.ErrorReply) and reply.code == "load_cancelled" for reply in replies)
    again = bench.send(p.Load(path, AS_STORED, 60.0))  # not parked with the cancelled job
    assert bench.work() == 2
    assert isinstance(bench.answer(again), p.Loaded)
    assert len(bench.rung.segments) == 1


def test_unloading_a_file_that_is_there_and_being_loaded_again_ends_both(bench: Bench) -> None:
    """In other dtypes it is a model of its own with the same name."""
    path = bench.file()
    bench.send(p.Load(path, AS_STORED, 60.0))
    bench.work()
    waiting = bench.send(p.Load(path, (DtypeRule("", "F16"),), 60.0))
    assert bench.ask(p.Unload("m.safetensors", False), p.Unloaded).model.state == "ready"
    reply = bench.answer(waiting)
    assert isinstance(reply, p.ErrorReply)
    assert reply.code == "load_cancelled"
    bench.work()
    assert bench.models() == ()


def test_loading_again_what_is_in_use_can_be_cancelled(bench: Bench) -> None:
    path = bench.file()
    bench.attach(bench.client(), path)
    bench.send(p.Load(path, (DtypeRule("", "F16"),), 60.0))
    assert bench.ask(p.Unload("m.safetensors", False), p.Unloaded).model.state == "loading"
    assert bench.refused(p.Unload("m.safetensors", False)) == "model_in_use"


def test_load_that_ends_just_as_it_is_cancelled_is_freed(bench: Bench) -> None:
    bench.send(p.Load(bench.file(), AS_STORED, 60.0))
    job = bench.worker.jobs.pop()
    outcome = job.run(bench.rung)
    bench.ask(p.Unload("m.safetensors", False), p.Unloaded)
    bench.service.finish(job, outcome)
    assert bench.rung.segments == {}
    assert bench.models() == ()


def test_unknown_model_is_not_found(bench: Bench) -> None:
    assert bench.refused(p.Unload("m.safetensors", True)) == "model_not_found"
    assert bench.refused(p.ShowModel("m.safetensors")) == "model_not_found"


# -- leases and clients ------------------------------------------------------------------------------------------------


def test_lease_of_another_client_is_not_released(bench: Bench) -> None:
    owner, other = bench.client(), bench.client()
    lease = bench.attach(owner, bench.file()).lease
    assert bench.refused(p.Detach(other, lease)) == "lease_unknown"
    bench.ask(p.Detach(owner, lease), p.Done)
    assert bench.refused(p.Detach(owner, lease)) == "lease_unknown"


def test_dying_client_with_several_leases_on_a_draining_model_frees_it_once(bench: Bench) -> None:
    client, path = bench.client(), bench.file()
    for _ in range(3):
        bench.attach(client, path)
    bench.ask(p.Unload("m.safetensors", True), p.Unloaded)
    bench.service.drop_client(client, "process ended")
    assert bench.rung.segments == {}
    assert len(bench.events(p.LeaseEnded)) == 3
    assert len(bench.events(p.ModelFreed)) == 1


def test_dying_client_leaves_the_leases_of_others_alone(bench: Bench) -> None:
    clients, path = [bench.client(), bench.client()], bench.file()
    for client in clients:
        bench.attach(client, path)
    bench.ask(p.Unload("m.safetensors", True), p.Unloaded)
    bench.service.drop_client(clients[0], "process ended")
    assert len(bench.rung.segments) == 1  # I2
    bench.service.drop_client(clients[1], "process ended")
    assert bench.rung.segments == {}


def test_request_of_a_client_that_died_waiting_grants_nothing(bench: Bench) -> None:
    client = bench.client()
    bench.send(p.Attach(client, bench.file(), AS_STORED, 60.0))
    bench.service.drop_client(client, "process ended")
    bench.work()
    status = bench.ask(p.GetStatus(), p.Status)
    assert (status.leases, len(status.models)) == (0, 1)  # what was asked for is loaded all the same


def test_silent_unwatched_client_expires_and_a_watched_one_does_not(bench: Bench) -> None:
    """A client in another PID namespace, say: the host cannot see its process."""
    unseen, seen, path = bench.client(watched=False), bench.client(), bench.file()
    for client in (unseen, seen):
        bench.attach(client, path)
    bench.clock.advance(14)
    bench.ask(p.Renew(unseen), p.Done)
    bench.clock.advance(14)
    bench.service.tick()
    assert bench.ask(p.GetStatus(), p.Status).leases == 2
    bench.clock.advance(2)
    bench.service.tick()
    assert bench.ask(p.GetStatus(), p.Status).leases == 1
    assert [event.reason for event in bench.events(p.ClientLeft)] == ["silent for 15 s"]
    assert bench.refused(p.Renew(unseen)) == "not_registered"


def test_silent_client_that_waits_for_a_load_hears_that_it_was_dropped(bench: Bench) -> None:
    client = bench.client(watched=False)
    number = bench.send(p.Attach(client, bench.file(), AS_STORED, 60.0))
    bench.clock.advance(16)
    bench.service.tick()
    reply = bench.answer(number)
    assert isinstance(reply, p.ErrorReply)
    assert reply.code == "not_registered"


def test_lease_whose_grant_cannot_be_delivered_ends_at_once(bench: Bench) -> None:
    client, path = bench.client(), bench.file()
    bench.send(p.Attach(client, path, AS_STORED, 60.0), route=b"gone")
    bench.outbox.deaf.add(b"gone")
    bench.work()
    assert bench.ask(p.GetStatus(), p.Status).leases == 0
    assert [event.reason for event in bench.events(p.LeaseEnded)] == ["undelivered"]


# -- what people see ---------------------------------------------------------------------------------------------------


def test_descriptions_agree_with_each_other(bench: Bench) -> None:
    clients, path = [bench.client(), bench.client()], bench.file()
    for client in [*clients, clients[0]]:
        bench.attach(client, path)
    bench.clock.advance(3.0)
    (model,) = bench.models()
    status = bench.ask(p.GetStatus(), p.Status)
    detail = bench.ask(p.ShowModel("m.safetensors"), p.ModelDetail)
    people = bench.ask(p.ListClients(), p.Clients).clients
    assert model == detail.model == status.models[0]
    assert (model.clients, model.saved, status.saved_nbytes) == (2, model.nbytes, model.nbytes)
    assert (status.clients, status.leases, len(detail.leases)) == (2, 3, 3)
    assert status.shared_nbytes == model.memory_nbytes == sum(detail.manifest.segments)
    assert sorted(len(person.leases) for person in people) == [1, 2]
    assert {person.watched for person in people} == {"process"}
    assert all(lease.held_s == 3.0 for lease in detail.leases)
    assert status.counters["request.Attach"] == 3


def test_refusals_are_counted_by_code(bench: Bench) -> None:
    bench.refused(p.Renew("nobody"))
    bench.refused(p.ShowModel("nothing"))
    counters = bench.ask(p.GetStatus(), p.Status).counters
    assert (counters["error.not_registered"], counters["error.model_not_found"]) == (1, 1)


def test_shutdown_is_answered_before_the_host_ends(bench: Bench) -> None:
    bench.ask(p.Shutdown(), p.Done)
    assert bench.service.stopping


def test_closing_host_tells_everyone_and_gives_everything_back(bench: Bench) -> None:
    bench.attach(bench.client(), bench.file("a.safetensors"))
    number = bench.send(p.Load(bench.file("b.safetensors", seed=1), AS_STORED, 60.0))
    bench.service.farewell("signal SIGTERM")
    bench.service.close()
    reply = bench.answer(number)
    assert isinstance(reply, p.ErrorReply)
    assert reply.code == "host_lost"
    assert bench.events(p.HostStopping) == [p.HostStopping(bench.service.info.host_id, "signal SIGTERM")]
    bench.work()  # a load that was under way
    assert bench.rung.segments == {}


def test_root_that_no_message_can_name_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="UTF-8"):
        Bench(tmp_path / "\udcff")


def test_every_answer_and_event_can_be_sent(bench: Bench) -> None:
    bench.attach(bench.client(), bench.file())
    bench.ask(p.Unload("m.safetensors", True), p.Unloaded)
    bench.service.farewell("done")
    bench.service.close()
    for message in [*bench.outbox.events, *(reply for _, _, reply in bench.outbox.replies)]:
        try:
            p.pack(message, 1)
        except LunashmError as exc:
            pytest.fail(f"{type(message).__name__}: {exc}")

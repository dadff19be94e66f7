"""A device without room: who asks is refused in time, who has a model keeps it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from lunashm import protocol as p
from lunashm.errors import OutOfSharedMemory
from tests.host.strict_rung import StrictRung
from tests.host.test_service import AS_F32, AS_STORED, Bench

NBYTES = 3000
SIZE = 4096
"""Room for one model of ``NBYTES``, not for two."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, StrictRung(SIZE))


def file(bench: Bench, name: str, seed: int = 0, nbytes: int = NBYTES) -> str:
    return bench.file(name, seed, {"a": ("U8", (nbytes,))})


def attached_bytes(bench: Bench, attached: p.Attached) -> bytes:
    spec = attached.manifest.tensors[0]
    mapping = memoryview(bench.rung.open(attached.handles[0]))
    return bytes(mapping[spec.offset : spec.offset + spec.nbytes])


def test_model_that_does_not_fit_beside_another_is_refused_and_the_other_stays_served(bench: Bench) -> None:
    client, first, second = bench.client(), file(bench, "first.safetensors"), file(bench, "second.safetensors", seed=1)
    held = bench.attach(client, first)
    number = bench.send(p.Attach(client, second, AS_STORED, 60.0))
    bench.work()
    refusal = bench.answer(number)
    assert isinstance(refusal, p.ErrorReply)
    assert refusal.code == "out_of_shared_memory"
    assert "needed" in refusal.message and "free" in refusal.message
    assert [event.path for event in bench.events(p.LoadFailed)] == [second]
    assert [model.path for model in bench.models()] == [first]
    assert len(bench.rung.segments) == 1
    again = bench.ask(p.Attach(bench.client(), first, AS_STORED, 0.0), p.Attached)
    assert again.manifest.generation == held.manifest.generation
    assert attached_bytes(bench, again) == attached_bytes(bench, held) == Path(first).read_bytes()[-NBYTES:]


def test_file_that_does_not_fit_is_not_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    number = bench.send(p.Load(file(bench, "large.safetensors", nbytes=2 * SIZE), AS_STORED, 60.0))
    monkeypatch.setattr(os, "preadv", lambda *arguments: pytest.fail("its tensors were read"))
    bench.work()
    assert getattr(bench.answer(number), "code", "") == "out_of_shared_memory"
    assert isinstance(bench.rung, StrictRung)
    assert bench.rung.ever_staged == 0


def test_memory_that_runs_out_midway_is_given_back_whole(bench: Bench) -> None:
    def fail(number: int) -> None:
        raise OutOfSharedMemory("the device is full")

    assert isinstance(bench.rung, StrictRung)
    bench.rung.before_write = fail
    path = file(bench, "m.safetensors")
    number = bench.send(p.Attach(bench.client(), path, AS_STORED, 60.0))
    bench.work()
    assert getattr(bench.answer(number), "code", "") == "out_of_shared_memory"
    assert bench.models() == ()
    assert bench.rung.free_nbytes() == SIZE
    bench.rung.before_write = lambda number: None
    bench.attach(bench.client(), path)


def test_room_is_asked_for_what_is_served_not_for_what_is_stored(bench: Bench) -> None:
    path = bench.file("half.safetensors", tensors={"a": ("F16", (1500,))})
    number = bench.send(p.Load(path, AS_F32, 60.0))
    bench.work()
    assert getattr(bench.answer(number), "code", "") == "out_of_shared_memory"
    bench.attach(bench.client(), path)


def test_model_fits_as_soon_as_another_is_unloaded(bench: Bench) -> None:
    bench.send(p.Load(file(bench, "first.safetensors"), AS_STORED, 60.0))
    bench.work()
    bench.ask(p.Unload("first.safetensors", False), p.Unloaded)
    bench.attach(bench.client(), file(bench, "second.safetensors", seed=1))


def test_log_says_how_much_how_fast_and_where(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lunashm.host"):
        bench.attach(bench.client(), file(bench, "m.safetensors"))
    (line,) = [record.getMessage() for record in caplog.records if "ready" in record.getMessage()]
    assert f"({NBYTES} bytes) of heap memory in 0." in line
    assert " GB/s), blake3 " in line

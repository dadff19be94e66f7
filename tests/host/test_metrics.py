"""The host's books in Prometheus' words: a service whose time and work are the test's, no socket."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from lunashm import protocol as p
from lunashm.host import metrics
from lunashm.host.board import Board
from lunashm.host.scrape import registry
from tests.host.test_service import AS_F16, AS_F32, Bench
from tests.scraping import Page


class Measured(Bench):
    def page(self) -> Page:
        """As of now."""
        return Page(generate_latest(self.registry()).decode())

    def registry(self) -> CollectorRegistry:
        return registry(Board(self.service.snapshot, self.clock), self.clock)


@pytest.fixture
def bench(tmp_path: Path) -> Measured:
    return Measured(tmp_path)


def test_host_without_anything_says_so(bench: Measured) -> None:
    page = bench.page()
    assert page.value("build_info", version=bench.service.info.version, rung="heap", device="cpu") == 1
    for state in ("loading", "ready", "draining"):
        assert page.value("models", state=state) == 0
    assert page.labels("model_bytes") == []
    assert (page.value("clients"), page.value("leases"), page.value("saved_bytes")) == (0, 0, 0)
    assert page.value("free_bytes") == bench.rung.free_nbytes() > 0
    assert page.value("errors_total", code="internal") == 0, "shown before the first one, or rates miss it"
    assert page.value("leases_lost_total", reason="process_ended") == 0
    assert page.value("requests_total", type="Attach") == 0


def test_models_are_shown_with_tensors_memory_and_clients(bench: Measured) -> None:
    path = bench.file()
    one, two = bench.client(), bench.client()
    for client in (one, one, two):
        bench.attach(client, path)
    (model,) = bench.models()
    who = {"model": model.name, "digest": model.digest[:12]}
    page = bench.page()
    assert page.value("model_bytes", **who) == model.nbytes
    assert page.value("model_memory_bytes", **who) == model.memory_nbytes
    assert page.value("model_clients", **who) == 2
    assert (page.value("clients"), page.value("leases")) == (2, 3)
    assert page.value("saved_bytes") == model.nbytes
    assert page.value("free_bytes") == bench.rung.size - model.memory_nbytes
    assert page.value("models", state="ready") == 1


def test_model_is_counted_while_it_loads_and_while_it_drains(bench: Measured) -> None:
    path, client = bench.file(), bench.client()
    number = bench.send(p.Attach(client, path, (), 60.0))
    page = bench.page()
    assert (page.value("models", state="loading"), page.labels("model_bytes")) == (1, [])
    bench.work()
    attached = bench.answer(number)
    assert isinstance(attached, p.Attached)
    bench.ask(p.Unload("m.safetensors", True), p.Unloaded)
    page = bench.page()
    assert (page.value("models", state="draining"), len(page.labels("model_bytes"))) == (1, 1)
    bench.ask(p.Detach(client, attached.lease), p.Done)
    page = bench.page()
    assert (page.total("models"), page.labels("model_bytes")) == (0, [])


def test_one_file_in_two_sets_of_dtypes_is_two_series(bench: Measured) -> None:
    path, client = bench.file(), bench.client()
    bench.attach(client, path, AS_F16)
    bench.attach(client, path, AS_F32)
    assert {labels["model"] for labels in bench.page().labels("model_bytes")} == {"m.safetensors", "m.safetensors@2"}


@pytest.mark.parametrize(
    "name",
    [
        'say "hi".safetensors', "back\\slash\\n.safetensors", "two\nlines.safetensors", "größe 模型 😀.safetensors",
        "{a=1} # x.safetensors", "tab\t\r.safetensors",
    ],
)  # fmt: skip
def test_any_file_name_is_a_label_that_reads_back(bench: Measured, name: str) -> None:
    bench.attach(bench.client(), bench.file(name))
    assert [labels["model"] for labels in bench.page().labels("model_bytes")] == [name]
    families = read_openmetrics(openmetrics.generate_latest(bench.registry()).decode())
    (shown,) = next(family.samples for family in families if family.name == "lunashm_model_bytes")
    assert shown.labels["model"] == name


# -- timings -----------------------------------------------------------------------------------------------------------


def test_attaches_that_waited_for_a_load_are_told_from_those_that_did_not(bench: Measured) -> None:
    path, client = bench.file(), bench.client()
    bench.send(p.Attach(client, path, (), 60.0))
    bench.clock.advance(7.0)
    bench.send(p.Attach(client, path, (), 60.0))
    bench.clock.advance(2.0)
    bench.work()
    bench.attach(client, path)
    page = bench.page()
    assert page.value("attach_seconds_count", waited="yes") == 2
    assert page.value("attach_seconds_sum", waited="yes") == 9.0 + 2.0
    assert page.value("attach_seconds_bucket", waited="yes", le="2.5") == 1
    assert page.value("attach_seconds_bucket", waited="yes", le="10.0") == 2
    assert page.value("attach_seconds_bucket", waited="yes", le="+Inf") == 2
    assert page.value("attach_seconds_count", waited="no") == 1
    assert page.value("attach_seconds_bucket", waited="no", le="0.0005") == 1


def test_attach_that_was_refused_is_an_error_and_no_duration(bench: Measured) -> None:
    client = bench.client()
    bench.refused(p.Attach(client, str(bench.root / "missing.safetensors"), (), 1.0))
    bench.refused(p.Attach(client, bench.file(), (), 0.0))
    page = bench.page()
    assert page.total("attach_seconds_count") == 0
    assert page.value("errors_total", code="model_not_found") == 1
    assert page.value("errors_total", code="model_not_ready") == 1
    assert page.value("requests_total", type="Attach") == 2


def test_loads_are_timed_and_their_files_counted(bench: Measured) -> None:
    client, paths = bench.client(), [bench.file("a.safetensors", 1), bench.file("b.safetensors", 2)]
    for path in paths:
        bench.attach(client, path)
    page = bench.page()
    assert page.value("load_seconds_count") == 2
    assert page.value("load_seconds_sum") == pytest.approx(sum(model.load_s for model in bench.models()))
    assert page.value("load_bytes_total") == sum(Path(path).stat().st_size for path in paths)


def test_load_that_brought_no_model_is_not_timed(bench: Measured) -> None:
    client = bench.client()
    bench.attach(client, bench.file("a.safetensors"))
    bench.attach(client, bench.file("same.safetensors"))  # the same bytes
    cancelled = bench.send(p.Load(bench.file("c.safetensors", 3), (), 60.0))
    bench.ask(p.Unload("c.safetensors", False), p.Unloaded)
    bench.work()
    assert isinstance(bench.answer(cancelled), p.ErrorReply)
    page = bench.page()
    assert page.value("load_seconds_count") == 1
    assert page.value("errors_total", code="load_cancelled") > 0


# -- leases and clients ------------------------------------------------------------------------------------------------


def test_leases_that_no_client_gave_back_are_lost_for_a_reason(bench: Measured) -> None:
    path = bench.file()
    killed, silent, polite, leaving = bench.client(), bench.client(watched=False), bench.client(), bench.client()
    bench.attach(killed, path)
    bench.attach(killed, path)
    bench.attach(silent, path)
    bench.ask(p.Detach(polite, bench.attach(polite, path).lease), p.Done)
    bench.attach(leaving, path)
    bench.ask(p.Unregister(leaving), p.Done)
    bench.outbox.deaf.add(b"deaf")
    bench.send(p.Attach(polite, path, (), 1.0), b"deaf")
    bench.service.drop_client(killed, "process ended")
    bench.clock.advance(16.0)
    bench.service.tick()
    page = bench.page()
    assert page.value("leases_lost_total", reason="process_ended") == 2
    assert page.value("leases_lost_total", reason="silent") == 1
    assert page.value("leases_lost_total", reason="undelivered") == 1
    assert page.total("leases_lost_total") == 4
    for reason in ("left", "process_ended", "silent"):
        assert page.value("clients_gone_total", reason=reason) == 1
    assert (page.value("clients"), page.value("leases")) == (1, 0)


# -- what every page keeps to ------------------------------------------------------------------------------------------


def busy(bench: Measured) -> Page:
    """A page on which everything is shown."""
    client = bench.client()
    bench.attach(client, bench.file())
    bench.refused(p.Detach(client, 99))
    bench.service.counters["dropped.frames"] += 1
    bench.service.drop_client(client, "process ended")
    return bench.page()


def test_names_and_units_follow_the_conventions(bench: Measured) -> None:
    """What ``promtool check metrics`` asks for."""
    ours = [family for family in busy(bench).families if not family.name.startswith("process_")]
    assert len(ours) >= 18
    for family in ours:
        assert family.name.startswith("lunashm_")
        assert family.documentation.endswith("."), f"{family.name} has no HELP"
        assert family.samples or family.name.startswith("lunashm_model_"), family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
        for word in ("gauge", "counter", "histogram", "milli", "kilo", "mega", "giga", "percent", "_ms", "_mb"):
            assert word not in family.name
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels <= {"model", "digest", "state", "waited", "le", "type", "code", "reason", "what", "version",
                          "rung", "device"}, "no pid, path, client or lease is a label"  # fmt: skip
    times = {family.name for family in ours if family.type == "histogram"}
    assert times == {"lunashm_attach_seconds", "lunashm_load_seconds"}


def test_buckets_are_cumulative_and_end_with_the_count(bench: Measured) -> None:
    page = busy(bench)
    for family in page.families:
        if family.type != "histogram":
            continue
        series: dict[str, list[float]] = {}
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                series.setdefault(sample.labels.get("waited", ""), []).append(sample.value)
        counts = [sample.value for sample in family.samples if sample.name.endswith("_count")]
        assert [values[-1] for values in series.values()] == counts
        assert all(values == sorted(values) for values in series.values())


def test_everything_the_host_counts_is_shown_once(bench: Measured) -> None:
    page = busy(bench)
    names = {"request": "requests", "error": "errors", "lease": "leases_lost", "client": "clients_gone",
             "dropped": "dropped"}  # fmt: skip
    assert bench.service.counters
    for kind, name in names.items():
        counted = {k: n for k, n in bench.service.counters.items() if k.partition(".")[0] == kind}
        assert counted, f"the test counts no {kind}"
        assert page.total(f"{name}_total") == sum(counted.values())
    assert {key.partition(".")[0] for key in bench.service.counters} <= names.keys()


def test_words_known_beforehand_are_all_there_is(bench: Measured) -> None:
    """A word that the host counts and metrics do not know is still shown, but too late for a rate."""
    busy(bench)
    unknown = [key for key in bench.service.counters if key.split(".")[1] not in metrics.KNOWN[key.split(".")[0]]]
    assert unknown == []


def test_time_goes_on_while_the_snapshot_grows_old(bench: Measured) -> None:
    board = Board(bench.service.snapshot, bench.clock)
    found = registry(board, bench.clock)
    bench.clock.advance(30)
    page = Page(generate_latest(found).decode())
    assert (page.value("uptime_seconds"), page.value("snapshot_age_seconds")) == (30, 30)
    board.turn()
    page = Page(generate_latest(found).decode())
    assert (page.value("uptime_seconds"), page.value("snapshot_age_seconds")) == (30, 0)


def test_snapshot_does_not_change_with_the_books(bench: Measured) -> None:
    path, client = bench.file(), bench.client()
    found = bench.registry()
    before = [line for line in generate_latest(found).decode().splitlines() if line.startswith("lunashm")]
    bench.attach(client, path)
    bench.refused(p.Detach(client, 99))
    assert [line for line in generate_latest(found).decode().splitlines() if line.startswith("lunashm")] == before


def test_only_what_is_asked_for_can_be_asked_for(bench: Measured) -> None:
    page = Page(generate_latest(bench.registry().restricted_registry(["lunashm_clients"])).decode())
    assert [family.name for family in page.families] == ["lunashm_clients"]


def test_registry_is_the_hosts_own(bench: Measured) -> None:
    text = generate_latest(bench.registry()).decode()
    assert "process_resident_memory_bytes" in text
    assert "python_gc" not in text

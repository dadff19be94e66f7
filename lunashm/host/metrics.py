"""A snapshot of the host's books in Prometheus' words. Pure: no sockets, no threads, no clock.

Base units, ``_total`` on what only grows; labels are words of ours (types, codes, reasons), but for the name and digest
of what is loaded. Labels whose values are known beforehand are there from the start, at 0, so that rates see the
first event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from lunashm import errors
from lunashm import protocol as p
from lunashm.host.board import Snapshot
from lunashm.host.catalog import State
from lunashm.host.timings import BOUNDS_S, Distribution

DIGEST_CHARS = 12
"""Of the content's digest: as many as the log shows."""

_STATES = ("loading", *(state.value for state in State))
_REFUSALS = (errors.ProtocolError, errors.ModelError, errors.SharedMemoryError, errors.LeaseError)

KNOWN: dict[str, tuple[str, ...]] = {
    "request": tuple(kind.__name__ for kind in (*get_args(p.Request), p.Redeem)),
    "error": ("internal", *(code for code, kind in errors.BY_CODE.items() if issubclass(kind, _REFUSALS))),
    "lease": ("process_ended", "silent", "undelivered"),
    "client": ("left", "process_ended", "silent"),
    "dropped": ("frames", "replies", "events", "accepts", "handovers"),
}
"""The host's counters, ``kind.word``, that are shown before they count anything."""


def families(snapshot: Snapshot, age_s: float) -> Iterator[Metric]:
    """``age_s``: how long ago the snapshot was taken."""
    status, timings = snapshot.status, snapshot.timings
    build = {"version": status.host.version, "rung": status.host.rung, "device": status.host.device}
    yield InfoMetricFamily("lunashm_build", "Which lunashm serves, and how memory is shared on which device.", build)
    yield _gauge("uptime_seconds", "How long the host has been serving.", status.uptime_s + age_s)
    yield _gauge("snapshot_age_seconds", "How old these figures are; above 10 the host's event loop hangs.", age_s)
    yield from _models(status.models)
    yield _gauge("clients", "Registered client processes.", status.clients)
    yield _gauge("leases", "Leases held by clients: each is one model that one client is attached to.", status.leases)
    yield _gauge("saved_bytes", "What private copies would have cost: (clients - 1) x tensors.", status.saved_nbytes)
    yield _gauge("free_bytes", "Memory that further models could take.", status.free_nbytes)
    yield _histogram(
        "attach_seconds", "Attaches granted, from when the host took up the request to its answer."
        " waited: whether the model still had to be loaded.",
        {("no",): timings.attach, ("yes",): timings.attach_waited}, labels=("waited",),
    )  # fmt: skip
    yield _histogram("load_seconds", "Loads that brought a model into memory, frozen and digested.", {(): timings.load})
    yield CounterMetricFamily(
        "lunashm_load_bytes", "Bytes of the files that those loads have read.", value=timings.load_nbytes
    )
    yield from _counters(status.counters)


def _counters(count: Mapping[str, int]) -> Iterator[Metric]:
    yield _counter("requests", "Requests taken up, whatever became of them.", count, "request", "type")
    yield _counter("errors", "Errors told to clients, and loads that failed.", count, "error", "code")
    yield _counter("leases_lost", "Leases that ended without their client letting go.", count, "lease", "reason")
    yield _counter("clients_gone", "Clients that left or were dropped.", count, "client", "reason")
    lost = "Frames, replies, events, accepts and handovers that came to nothing."
    yield _counter("dropped", lost, count, "dropped", "what")


def _models(models: Iterable[p.ModelInfo]) -> Iterator[Metric]:
    models = tuple(models)
    states = Counter(model.state for model in models)
    number = GaugeMetricFamily("lunashm_models", "Models, each in one set of dtypes.", labels=("state",))
    for state in _STATES:
        number.add_metric((state,), states[state])
    yield number
    labels = ("model", "digest")
    tensors = GaugeMetricFamily("lunashm_model_bytes", "Bytes of a loaded model's tensors.", labels=labels)
    memory = GaugeMetricFamily("lunashm_model_memory_bytes", "Memory it takes, padding included.", labels=labels)
    clients = GaugeMetricFamily("lunashm_model_clients", "Client processes attached to it.", labels=labels)
    for model in models:
        if model.generation:  # what is still loading has no bytes, no digest, and a name that need not be its own
            who = (model.name, model.digest[:DIGEST_CHARS])
            tensors.add_metric(who, model.nbytes)
            memory.add_metric(who, model.memory_nbytes)
            clients.add_metric(who, model.clients)
    yield from (tensors, memory, clients)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lunashm_{name}", text, value=value)


def _counter(name: str, text: str, counters: Mapping[str, int], kind: str, label: str) -> Metric:
    """The host's own counters of one kind, by the word after the dot."""
    family = CounterMetricFamily(f"lunashm_{name}", text, labels=(label,))
    counted = {key.removeprefix(f"{kind}."): number for key, number in counters.items() if key.startswith(f"{kind}.")}
    for word, number in sorted((dict.fromkeys(KNOWN[kind], 0) | counted).items()):
        family.add_metric((word,), number)
    return family


def _histogram(
    name: str, text: str, distributions: Mapping[tuple[str, ...], Distribution], labels: tuple[str, ...] = ()
) -> Metric:
    family = HistogramMetricFamily(f"lunashm_{name}", text, labels=labels)
    bounds = (*map(str, BOUNDS_S), "+Inf")
    for values, distribution in distributions.items():
        buckets = list(zip(bounds, accumulate(distribution.counts), strict=True))
        family.add_metric(values, buckets, sum_value=distribution.total_s)
    return family

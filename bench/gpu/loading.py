"""Part 2: loading, by a host and by others, against the machine's own limits. Only says which steps there are."""

from __future__ import annotations

from bench.gpu import limits, loads, others, sweep
from bench.gpu.part import Part, Step

PART = Part(
    2, "loading", "loading from the page cache and from disk, against this machine's limits",
    (
        Step("limits", limits.copied, 60),
        Step("reads", limits.read_in, 60),
        Step("loads", loads.warm_loads, 60),
        Step("cold", loads.cold_loads, 50),
        Step("others", others.run, 75),
        Step("sweep", sweep.run, 90),
    ),
)  # fmt: skip

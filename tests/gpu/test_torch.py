"""Torch over mapped memory: views, allocators, streams. Everything in a process of its own; it may crash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from tests.contracts.remote import RemoteRung
from tests.contracts.rungs import Entry
from tests.gpu import weights
from tests.gpu.programs import Program

pytestmark = pytest.mark.gpu

NBYTES = weights.SIDE * weights.SIDE * 4
ALLOCATORS = {
    "native": {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"},
    "async": {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
    "expandable": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}


def test_tensor_is_the_mapping_and_keeps_it_until_the_last_view_is_gone(
    rung: RemoteRung, run: Callable[..., Program]
) -> None:
    client = run("view", weights.shared(rung))
    assert client.hear() == {
        "dtype": "torch.uint8", "shape": [NBYTES], "on": True, "digest": weights.digest(), "at_base": True,
    }  # fmt: skip
    assert client.hear() == {"offset": 1024, "nbytes": 4096, "same": True}
    part = hashlib.sha256(weights.data()[1024:5120]).hexdigest()
    assert client.hear() == {"ends": 0, "digest": part}
    assert client.hear() == {"ends": 0}
    assert client.hear() == {"ends": 1}
    assert client.end() == 0


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_mapped_weights_compute_what_private_ones_do_under_every_allocator(
    rung: RemoteRung, run: Callable[..., Program], allocator: str
) -> None:
    client = run("matmul", weights.shared(rung), **ALLOCATORS[allocator])
    seen = client.hear()
    assert seen["allocator"] == ("cudaMallocAsync" if allocator == "async" else "native")
    assert seen["equal"] == [True] * 8
    assert seen["digest"] == weights.digest()
    assert seen["goes_on"]
    assert client.end() == 0


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_record_stream_on_mapped_memory_is_recorded(
    entry: Entry, rung: RemoteRung, run: Callable[..., Program], allocator: str,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """Whether torch takes it depends on version and allocator: a fact to know. Harm to others would be a failure."""
    segment = weights.shared(rung)
    seen = run("record_stream", segment, **ALLOCATORS[allocator]).hear_or_death()
    record_property(f"record_stream {entry.rung} {allocator}", seen)
    print(f"record_stream {entry.rung} {allocator}: {seen}")
    assert rung.map(segment).digest() == weights.digest()

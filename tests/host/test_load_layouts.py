"""Any layout, cut anyhow, by any number of readers: the segment is what a naive copy of each tensor would make."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lunashm import views
from lunashm.host import checkpoint, loader
from lunashm.host.blocks import LEAST_NBYTES
from lunashm.host.loader import plan
from lunashm.host.pace import Pace
from lunashm.manifest import CONVERTIBLE, ITEMSIZE, DtypeRule, check_rules
from lunashm.views import convert
from tests import checkpoints
from tests.host.strict_rung import StrictRung

pytestmark = pytest.mark.timeout(120)

NAMES = st.lists(st.sampled_from(["a.", "b.", "c."]), min_size=1, max_size=10)
TENSOR = st.tuples(st.sampled_from(sorted(ITEMSIZE)), st.integers(0, 400))
RULES = st.dictionaries(st.sampled_from(["", "a.", "b."]), st.sampled_from(["", *sorted(CONVERTIBLE)]))
PACES = st.builds(
    Pace,
    block_nbytes=st.integers(LEAST_NBYTES, 700),
    buffers=st.integers(1, 6),
    readers=st.integers(1, 5),
    digesters=st.just(1),
)
DEVICES = st.sampled_from(["cpu", "GPU-1"])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lunashm-test-") as name:
        yield Path(name)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prefixes=NAMES, data=st.data(), rules=RULES, pace=PACES, pad=st.integers(0, 9), device=DEVICES)
def test_segment_and_digest_are_those_of_a_naive_copy(
    folder: Path, prefixes: list[str], data: st.DataObject, rules: dict[str, str], pace: Pace, pad: int, device: str
) -> None:
    tensors = {}
    for number, prefix in enumerate(prefixes):
        dtype, count = data.draw(TENSOR)
        tensors[f"{prefix}{number}"] = (dtype, (count,))
    path = folder / "m.safetensors"
    written = checkpoints.write(path, tensors, metadata={"pad": " " * pad})  # the data starts at any address
    found = checkpoint.read(path)
    layout = plan(found, check_rules(DtypeRule(prefix, dtype) for prefix, dtype in rules.items()))
    expected = bytearray(layout.nbytes)
    for spec in layout.specs:
        stored = bytearray(written[spec.name])
        served = stored if spec.stored == spec.dtype or not stored else convert(stored, spec.stored, spec.dtype)
        expected[spec.offset : spec.offset + spec.nbytes] = served
    rung, done = StrictRung(device=device), [0]
    loaded = loader.load(found, layout, rung, lambda now, total: done.append(now), pace)
    assert bytes(memoryview(rung.open(loaded.segment.export()))) == bytes(expected)
    assert loaded.digest == blake3(path.read_bytes()).hexdigest()
    assert done == sorted(set(done)) and done[-1] == found.source.size
    assert rung.staged == 0


@pytest.mark.parametrize("pad", range(8))
def test_elements_that_lie_askew_in_the_file_are_aligned_when_they_are_converted(
    tmp_path: Path, pad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    checkpoints.write(path, {"a": ("U8", (3,)), "b": ("F64", (100,))}, metadata={"pad": " " * pad})
    found, real, askew = checkpoint.read(path), views.convert, []

    def look(data: memoryview | bytearray, source: str, target: str) -> memoryview:
        askew.append(np.frombuffer(data, np.uint8).ctypes.data % ITEMSIZE[source])
        return real(data, source, target)

    monkeypatch.setattr(views, "convert", look)
    layout = plan(found, (DtypeRule("", "F16"),))
    loader.load(found, layout, StrictRung(), lambda done, total: None, Pace(128, 3, 1, 1))
    assert askew and not any(askew)

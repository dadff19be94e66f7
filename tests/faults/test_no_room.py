"""A /dev/shm that is too small, for real: a tmpfs of a few MB in a mount namespace of the host's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lunashm import protocol as p
from lunashm.client.connection import Connection
from lunashm.errors import OutOfSharedMemory
from tests import checkpoints
from tests.host_process import HostProcess, started

SMALL_SHM = ("unshare", "--mount", "--map-root-user", "sh", "-c",
             'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$0" "$@"')  # fmt: skip


def can_mount() -> bool:
    try:
        return subprocess.run([*SMALL_SHM, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def cramped(runtime: Path) -> Iterator[HostProcess]:
    if not can_mount():
        pytest.skip("needs the right to mount a tmpfs in a namespace (unshare --mount --map-root-user)")
    (runtime / "models").mkdir()
    with started(runtime, runtime / "models", prefix=SMALL_SHM) as host:
        yield host


def test_model_that_does_not_fit_is_refused_with_the_sizes_and_one_that_fits_is_served(cramped: HostProcess) -> None:
    large, small = cramped.models / "large.safetensors", cramped.models / "small.safetensors"
    checkpoints.write(large, {"a": ("U8", (6_000_000,))})
    checkpoints.write(small, {"a": ("U8", (3_000_000,))})
    with pytest.raises(OutOfSharedMemory, match=r"6\.0 MB needed, 4\.2 MB free of 4\.2 MB; .*--shm-size"):
        cramped.ask(p.Load(str(large), (), 60.0))
    assert cramped.status().free_nbytes == 4 << 20  # nothing was written
    assert isinstance(cramped.ask(p.Load(str(small), (), 60.0)), p.Loaded)
    with pytest.raises(OutOfSharedMemory, match=r"3\.0 MB needed, 1\.\d MB free"):
        checkpoints.write(small.with_name("second.safetensors"), {"a": ("U8", (3_000_000,))}, seed=1)
        cramped.ask(p.Load(str(small.with_name("second.safetensors")), (), 60.0))
    cramped.ask(p.Unload("small.safetensors", False))
    assert isinstance(cramped.ask(p.Load(str(small.with_name("second.safetensors")), (), 60.0)), p.Loaded)


def test_two_models_at_once_of_which_one_fits_never_fill_the_memory(cramped: HostProcess) -> None:
    """Both fit alone, so each would be let in if the room one was promised were not counted."""
    paths = [cramped.models / name for name in ("a.safetensors", "b.safetensors")]
    for seed, path in enumerate(paths):
        checkpoints.write(path, {"a": ("U8", (2_500_000,))}, seed=seed)
    connection = Connection(cramped.endpoint)
    futures = [connection.submit(p.Load(str(path), (), 60.0)) for path in paths]
    replies = [future.result(30) for future in futures]
    connection.close()
    assert sorted(type(reply).__name__ for reply in replies) == ["ErrorReply", "Loaded"]
    assert [r.code for r in replies if isinstance(r, p.ErrorReply)] == ["out_of_shared_memory"]
    assert cramped.status().counters.get("error.internal", 0) == 0

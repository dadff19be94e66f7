"""What every test gets: a runtime directory of its own, a clean /dev/shm, and an honest last line of the run."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiers
from tests.host_process import HostProcess, started
from tests.waiting import until

SHM = Path("/dev/shm")


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory with a path short enough for sockets, which pytest's own may not be."""
    path = Path(tempfile.mkdtemp(prefix="lunashm-test-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def isolated(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, file or host of the developer's reaches a test, but for the checkout to test with."""
    for name in [name for name in os.environ if name.startswith("LUNASHM_") and name != "LUNASHM_COMFYUI"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def no_segment_left_over() -> Iterator[None]:
    """Whatever the tests put into /dev/shm is gone when they end. Segments of hosts that live are other people's."""
    gc.freeze()  # tests collect garbage often; what was imported by now is none
    before = segments()
    yield
    gc.collect()
    until(lambda: not orphans(segments() - before), f"segments left in /dev/shm: {segments() - before}", 5)


def segments() -> set[Path]:
    return set(SHM.glob(f"lunashm-{os.getuid()}-*"))


def orphans(paths: set[Path]) -> set[Path]:
    """Those whose host is dead."""
    return {path for path in paths if _is_orphan(path)}


def _is_orphan(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.fixture(scope="session")
def common_host() -> Iterator[HostProcess]:
    """One host process for all tests that need some host and leave it as they found it; it takes seconds to start."""
    with _common_host("posix") as host:
        yield host


@pytest.fixture(scope="session")
def common_memfd_host() -> Iterator[HostProcess]:
    """Another one, whose memory has no name: its descriptors are handed over."""
    with _common_host("memfd") as host:
        yield host


@contextlib.contextmanager
def _common_host(rung: str) -> Iterator[HostProcess]:
    runtime = Path(tempfile.mkdtemp(prefix="lunashm-test-"))
    (runtime / "models").mkdir()
    with started(runtime, runtime / "models", rung=rung) as host:
        yield host
        assert host.status().counters.get("error.internal", 0) == 0, host.log()
    assert "Traceback" not in host.log()
    shutil.rmtree(runtime)


@pytest.fixture
def host(common_host: HostProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostProcess]:
    """The common host; whatever a test loads into it is unloaded afterwards."""
    with lent(common_host, monkeypatch):
        yield common_host


@contextlib.contextmanager
def lent(common_host: HostProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(common_host.runtime))
    yield
    gc.collect()
    common_host.empty()


@pytest.fixture
def own_host(runtime: Path) -> Iterator[HostProcess]:
    """A host process that the test may kill."""
    (runtime / "models").mkdir()
    with started(runtime, runtime / "models") as host:
        yield host


# -- tiers -------------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and remember each test's tier for the summary."""
    reasons = {tier: tiers.why_not(tier) for tier in {_tier(item) for item in items}}
    for item in items:
        tier = _tier(item)
        item.user_properties.append(("tier", tier))
        if reasons[tier] is not None:
            item.add_marker(pytest.mark.skip(reason=f"{tier}: {reasons[tier]}"))


def _tier(item: pytest.Item) -> str:
    return next((tier for tier in tiers.TIERS[1:] if item.get_closest_marker(tier) is not None), "core")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """One line that says which tiers ran, below everything but pytest's own count."""
    yield
    terminalreporter.ensure_newline()
    terminalreporter.write_line("tiers: " + ", ".join(_summary(terminalreporter, tier) for tier in tiers.TIERS))


def _summary(reporter: pytest.TerminalReporter, tier: str) -> str:
    def count(outcome: str) -> int:
        reports = reporter.stats.get(outcome, [])
        return sum(dict(getattr(report, "user_properties", ())).get("tier") == tier for report in reports)

    passed, failed = count("passed"), count("failed") + count("error")
    bad = f", failed {failed}" if failed else ""
    if tier == "core":
        return f"core (passed {passed}{bad})"
    reason = tiers.why_not(tier)
    if reason is not None:
        return f"{tier} (skipped: {reason})"
    if passed + failed == 0:
        return f"{tier} (none selected)"
    return f"{tier} (ran {passed + failed}{tiers.against(tier)}{bad})"

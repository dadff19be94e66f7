"""``make gpu DRY=1``: every step of the suite's parts goes its whole way on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import contract, torch_gpu
from bench.gpu.registry import PARTS
from bench.gpu.suite import PART_LIMIT_S
from bench.root import ROOT

MINE = (1, 2)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--parts", ",".join(map(str, MINE)), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    records = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(record["error"] for record in records)
    return out


def test_every_step_ran_and_none_is_a_figure_of_a_gpu(dry):
    for part in PARTS:
        for step in part.steps if part.number in MINE else ():
            record = json.loads((dry / f"part{part.number}-{step.name}.json").read_text())
            assert record["status"] == "ok", record["error"]
            assert record["about"].startswith("DRY RUN")
            assert record["hardware"]["gpus"] == []
            assert record["figures"]
    assert (dry / "README.md").read_text().startswith("**DRY RUN")


def test_questions_are_answered_as_the_stand_in_would(dry):
    """Its semantics are the documented ones, so an answer that differs is the suite's mistake."""

    def facts(name: str) -> dict:
        return json.loads((dry / f"part1-{name}.json").read_text())["facts"]

    deaths = facts("deaths")
    assert deaths["cuda-vmm: read when memory was taken"]["driver copy"] == {"same": 3}
    assert deaths["cuda-vmm: host killed"]["check"] == ""
    assert deaths["cuda-ipc: host killed"]["check"].startswith("HostLost: ")
    violation = facts("violation")
    assert violation["kernel: the writer"]["died"] == -11
    assert violation["host"] == "alive"
    assert violation["a client that comes afterwards"] == "the same bytes"
    assert facts("allocators")["cuda-vmm, async"]["allocator"] == "cudaMallocAsync"
    assert set(facts("nvml")["cuda-vmm: attached 2"]["processes"]) == {"host", "client 1", "client 2"}
    assert facts("environment")["doctor exit code"] == 0
    assert facts("torch")["skipped"].keys() == {"gpu: no CUDA device"}


def test_each_part_is_expected_to_take_less_than_its_limit():
    for part in PARTS:
        assert sum(step.expected_s for step in part.steps) <= PART_LIMIT_S, part.name
    assert len({part.number for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert len({step.name for step in part.steps}) == len(part.steps)


def test_failures_are_read_from_pytests_report_with_their_last_lines(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('what it saw', {'same': 50})\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_left_out(): pytest.skip('no such thing')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=report.xml", "-p", "no:cacheprovider", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    found = contract.read(tmp_path / "report.xml")
    assert [figure.value for figure in found.figures] == [1, 1, 1]
    assert found.facts["failures"].keys() == {"test_it::test_bad"}
    assert "assert 1 == 2" in found.facts["failures"]["test_it::test_bad"]
    assert found.facts["skipped"] == {"no such thing": 1}
    assert found.facts["what it saw"] == "{'same': 50}"


def test_name_that_torch_lacks_or_arguments_that_it_does_not_take_show_in_a_dry_run():
    class Owner:
        @staticmethod
        def synchronize(device: object = None) -> None:
            raise AssertionError("nothing of a GPU is called")

    torch_gpu._stand_in(Owner, "synchronize", lambda *_, **__: None)
    Owner.synchronize()
    with pytest.raises(TypeError):
        Owner.synchronize(devise=1)
    with pytest.raises(AttributeError):
        torch_gpu._stand_in(Owner, "synchronise", lambda: None)

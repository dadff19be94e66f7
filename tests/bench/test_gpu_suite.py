"""How the GPU suite runs steps: which again, which not, how long, and what is left of one that dies or hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import machine, suite
from bench.gpu.suite import Run
from bench.root import ROOT
from tests.bench import gpu_parts
from tests.standin.build import environment
from tests.waiting import until

REGISTRY = "tests.bench.gpu_parts"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(out: Path, scratch: Path, *numbers: int, **options: Any) -> dict[str, str]:
    parts = [part for part in gpu_parts.PARTS if part.number in numbers]
    return suite.run(Run(parts, out, scratch, registry=REGISTRY, say=lambda line: None, **options))


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


def ran(scratch: Path) -> list[str]:
    return (scratch / "ran.txt").read_text().split()


def test_finished_step_is_not_run_again_unless_asked_for(out, scratch):
    run(out, scratch, 4)
    assert record(out, "part4-misses")["status"] == "ok"
    assert run(out, scratch, 4) == {}
    assert ran(scratch) == ["misses"]
    run(out, scratch, 4, fresh=True)
    assert ran(scratch) == ["misses", "misses"]


def test_step_is_run_again_by_other_code_and_by_a_real_run_after_a_dry_one(out, scratch):
    run(out, scratch, 4)
    path = out / "part4-misses.json"
    path.write_text(json.dumps(record(out, "part4-misses") | {"code": "of another day"}))
    run(out, scratch, 4, keep=True)
    assert len(ran(scratch)) == 1
    run(out, scratch, 4)
    assert len(ran(scratch)) == 2
    path.write_text(json.dumps(record(out, "part4-misses") | {"dry": True}))
    run(out, scratch, 4)
    assert len(ran(scratch)) == 3


def test_failed_step_is_recorded_with_its_words_and_run_again(out, scratch):
    open_steps = run(out, scratch, 2)
    assert open_steps == {"2 mends": "failed", "2 dies": "died"}
    assert "RuntimeError: not mended yet" in record(out, "part2-mends")["error"]
    (scratch / "mended").touch()
    assert run(out, scratch, 2) == {"2 dies": "died"}
    assert record(out, "part2-mends")["error"] == ""


def test_step_that_dies_is_recorded_with_the_signal_and_what_it_said(out, scratch):
    run(out, scratch, 2)
    error = record(out, "part2-dies")["error"]
    assert "was ended by SIGABRT" in error
    assert "about to end" in error


def test_step_that_hangs_is_ended_with_all_that_it_started(out, scratch):
    assert run(out, scratch, 3, limit_s=6.0) == {"3 hangs": "timeout"}
    found = record(out, "part3-hangs")
    assert "was not done after" in found["error"]
    assert "waiting for what never comes" in found["error"]
    pid = int((scratch / "child.txt").read_text())
    until(lambda: _is_gone(pid), "the child is gone", 5)


def _is_gone(pid: int) -> bool:
    """Or a zombie, whose parent does not wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_step_that_does_not_fit_is_left_for_the_next_call_and_said(out, scratch):
    open_steps = run(out, scratch, 1)
    assert list(open_steps) == ["1 large"]
    assert "it takes some 1000 s, more than --time-limit 480" in open_steps["1 large"]
    assert not (out / "part1-large.json").exists()
    assert run(out, scratch, 1, limit_s=2000.0) == {}
    assert ran(scratch) == ["good", "good"]


def test_step_that_needs_comfyui_is_left_open_without_one(out, scratch):
    assert run(out, scratch, 5) == {"5 draws": "no ComfyUI checkout is named (--comfyui DIR)"}
    assert run(out, scratch, 5, comfyui=Path("/nowhere")) == {}


# -- the command -------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """On the stand-in driver, where it finds a GPU by name."""
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--registry", REGISTRY, *map(str, arguments)], cwd=ROOT,
        env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_missed_target_and_open_step_have_exit_codes_and_a_last_line(out, scratch):
    done = command("--parts", "4", "--out", out, "--scratch", scratch)
    assert done.returncode == 1, done.stderr
    assert "missed: misses: speed of the slow" in done.stdout
    page = (out / "README.md").read_text()
    assert "Device: Stand-in GPU 0" in page
    assert "| speed of the slow | 2 | GB/s | >= 3 | **no** |" in page
    assert "0 of 1 targets are met." in page
    assert (out / "part4.png").exists()
    done = command("--parts", "1,2", "--out", out, "--scratch", scratch)
    assert done.returncode == 2
    assert "open: 1 large (it takes some 1000 s" in done.stdout.splitlines()[-1]
    assert "2 dies (died)" in done.stdout.splitlines()[-1]
    page = (out / "README.md").read_text()
    assert "| speed of the slow | 2 |" in page, "what an earlier call found stays"
    assert "| speed of the good | 4322 | GB/s | >= 1 | yes |" in page
    assert "| a fact | seen \\| so |" in page
    assert "was ended by SIGABRT" in page
    assert "DRY RUN" not in page


def test_dry_run_shows_no_value_and_never_misses(out, scratch):
    done = command("--dry", "--parts", "1,4", "--out", out, "--scratch", scratch)
    assert done.returncode == 0, done.stderr
    page = (out / "README.md").read_text()
    assert page.splitlines()[0].startswith("**DRY RUN: ")
    assert "nothing in here is a figure of a GPU" in page.splitlines()[0]
    assert "4322" not in page
    assert "4321" not in page
    assert "ran: 1 figures of 2 samples" in page
    for file in out.glob("*.json"):
        found = json.loads(file.read_text())
        assert found["about"].startswith("DRY RUN")
        assert found["dry"] is True
        assert found["met"] is True
        assert [figure["met"] for figure in found["figures"]] == [None]


def test_dry_run_is_refused_where_results_of_gpus_lie():
    folder = ROOT / "bench" / "results" / "some-gpu"
    done = command("--dry", "--out", folder)
    assert done.returncode == 1
    assert "this is a dry run" in done.stderr
    assert not folder.exists()


def test_dry_run_takes_a_new_folder_that_says_so(scratch):
    done = command("--dry", "--parts", "4", "--scratch", scratch)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().removeprefix("DRY RUN: every step ran; nothing in ").split()[0])
    assert "DRY-RUN" in folder.name
    assert (folder / "README.md").exists()
    shutil.rmtree(folder)


def test_machine_without_a_gpu_is_told_what_runs_there():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, env=os.environ | environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "sees no NVIDIA GPU" in done.stderr
    assert "make gpu DRY=1" in done.stderr


def test_interrupted_run_ends_its_step_and_says_what_is_open(out, scratch):
    running = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", "--registry", REGISTRY, "--parts", "1,3", "--out", str(out),
         "--scratch", str(scratch)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    until(lambda: (scratch / "child.txt").exists() and (scratch / "child.txt").read_text() != "", "it hangs", 60)
    pid = int((scratch / "child.txt").read_text())
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 2
    assert said.startswith("open: the rest (interrupted)")
    assert "| speed of the good | 4322 |" in (out / "README.md").read_text(), "what was done is kept"
    until(lambda: _is_gone(pid), "the child is gone", 5)


def test_packages_that_are_carried_reach_every_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/carried")
    for dry in (False, True):
        assert machine.environment(dry)["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/carried"]
    code = "from tests.contracts import rungs; print(rungs.GPU[0].environment()['PYTHONPATH'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().split(os.pathsep) == [str(ROOT), "/carried"]


def test_unknown_part_is_named_beside_those_that_there_are():
    done = command("--parts", "9")
    assert done.returncode == 1
    assert "there is no part 9; there are 1 (well)" in done.stderr

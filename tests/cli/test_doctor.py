"""The whole command; what each check finds out is in ``checks``."""

from __future__ import annotations

import json
import subprocess
import sys

from lunashm.cli.checks import limits
from tests.cli.conftest import ROOT
from tests.standin import build

GPU = "GPU-bbbbbbbb-0000-4000-8000-000000000001"


def test_a_healthy_machine_without_a_host_passes_with_a_hint(cli):
    result = cli("doctor", "--json")
    assert (result.code, result.json["ok"], result.json["device"]) == (0, True, "cpu")
    checks = {check["name"]: check for check in result.json["checks"]}
    assert {check["state"] for check in checks.values()} <= {"ok", "warn"}
    assert checks["host"]["state"] == "warn"
    assert {name for name in ("settings", "torch", "posix", "memfd", "proc") if checks[name]["state"] != "ok"} == set()
    assert {"name", "state", "detail", "fix", "seconds"} == set(checks["torch"])


def test_people_see_each_check_with_what_to_do_and_a_sum(cli):
    result = cli("doctor", "--device", "cpu")
    assert "host: no host is running\n     -> start one with: lunashm serve --device cpu" in result.out
    assert "skip GPU driver: only the CPU is looked at" in result.out
    assert " 0 failed, " in result.out.splitlines()[-1]


def test_a_check_that_crashes_is_a_failure_and_no_traceback(cli, monkeypatch):
    monkeypatch.setattr(limits, "proc", lambda: 1 / 0)
    result = cli("doctor", "--json")
    (failed,) = [check for check in result.json["checks"] if check["state"] == "fail"]
    assert (result.code, failed["name"], failed["fix"]) == (1, "proc", "please report it: proc: ZeroDivisionError")
    assert "Traceback" not in result.err


def test_settings_that_do_not_parse_fail_and_nothing_else_does(cli, tmp_path):
    (tmp_path / "lunashm.toml").write_text("mode = 'sometimes'")
    failed = [check for check in cli("doctor", "--json").json["checks"] if check["state"] == "fail"]
    assert [check["name"] for check in failed] == ["settings"]


def test_one_gpu_is_looked_at_by_its_name_and_exit_status_says_that_it_cannot_share(runtime):
    def run(**variables):
        command = [sys.executable, "-m", "lunashm", "doctor", "--device", "cuda:1", "--json"]
        return subprocess.run(
            command, env=build.environment(**variables), cwd=ROOT, capture_output=True, text=True, check=False
        )

    good = run()
    checks = {check["name"]: check for check in json.loads(good.stdout)["checks"]}
    assert good.returncode == 0, good.stdout
    assert GPU in checks["cuda:1"]["detail"]
    assert "cuda:0" not in checks
    bad = run(LUNASHM_STANDIN_FAIL="cuMemCreate=801:1,cuIpcGetMemHandle=801:1")
    failed = [check for check in json.loads(bad.stdout)["checks"] if check["state"] == "fail"]
    assert (bad.returncode, [check["name"] for check in failed]) == (1, ["cuda:1 cuda-ipc"])


def test_a_running_host_is_looked_at(cli, models, lent):
    checks = {check["name"]: check for check in cli("doctor", "--device", "cpu", "--json").json["checks"]}
    assert (checks["host"]["state"], checks["host namespaces"]["state"]) == ("ok", "ok")

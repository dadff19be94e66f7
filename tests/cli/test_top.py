"""What ``top`` shows of real hosts and clients, in one look and as a log."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from lunashm.cli import exits
from tests.waiting import until

from .conftest import CLIENT, ROOT, SERVE, Program, checkpoint, large

TOP = ["-m", "lunashm", "top"]
READER = """
import sys, lunashm.client
with lunashm.client.attach(sys.argv[1], label="reader") as model:
    total = sum(float(tensor.sum()) for tensor in model.state_dict().values())
    print(total, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def host(runtime, tmp_path):
    """One that a test may end."""
    program = Program([*SERVE, "--root", str(tmp_path)], runtime).start()
    yield program
    program.end()


# -- once --------------------------------------------------------------------------------------------------------------


def test_once_shows_the_host_its_models_and_who_holds_them(cli, painter, lent):
    shown = cli("top")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"cpu: posix, host pid {lent.process.pid}, up ")
    assert "in use (PSS of the host and 1 client" in shown.out
    (line,) = [line for line in shown.out.splitlines() if line.lstrip().startswith(f"{painter.process.pid} ")]
    assert line.split()[2:4] == ["painter", "painted.safetensors"]


def test_looking_makes_no_client(cli, painter):
    look = cli("top", "--json").json
    (host,) = look["hosts"]
    assert host["clients"] == 1
    assert [client["info"]["label"] for client in cli("clients", "--json").json["clients"]] == ["painter"]


def test_shared_and_private_memory_are_told_apart_whether_one_or_two_map_a_model(cli, host, runtime, tmp_path):
    path = large(tmp_path / "large.safetensors")
    readers = [Program(["-c", READER, str(path)], runtime).start()]
    try:
        (alone,) = cli("top", "--json").json["hosts"]
        readers.append(Program(["-c", READER, str(path)], runtime).start())
        (both,) = cli("top", "--json").json["hosts"]
    finally:
        for reader in readers:
            reader.end()
    one, first, second = alone["processes"][1], *both["processes"][1:]
    for process in (one, first, second):
        assert abs(process["shared_nbytes"] - 40_000_000) < 1_000_000
    assert one["private_nbytes"] < one["pss_nbytes"] - one["shared_nbytes"] + 1_000_000, "the model is not in it"
    assert first["private_nbytes"] < one["private_nbytes"] + 5_000_000
    assert one["pss_nbytes"] - first["pss_nbytes"] > 15_000_000, "half of the model is the other's now"
    assert both["ram"]["clients"] == 2
    assert both["ram"]["total_nbytes"] == sum(process["pss_nbytes"] for process in both["processes"])
    assert both["ram"]["unshared_nbytes"] > both["ram"]["total_nbytes"] - both["processes"][0]["pss_nbytes"]
    assert both["weights_nbytes"] >= 40_000_000


def test_without_a_host_it_ends_as_every_command(cli):
    for flags in (["--once"], ["--json"], []):
        assert cli("top", *flags).code == exits.NO_HOST


def test_a_host_that_does_not_answer_is_an_error_once(cli, host, monkeypatch):
    monkeypatch.setattr("lunashm.cli.top.REPLY_S", 0.2)
    host.process.send_signal(signal.SIGSTOP)
    try:
        result = cli("top", "--json")
    finally:
        host.process.send_signal(signal.SIGCONT)
    assert (result.code, result.json["error"]["code"]) == (exits.TIMEOUT, "host_timeout")


@pytest.mark.parametrize("interval", ["0.05", "0", "-1", "nan", "inf", "soon"])
def test_an_interval_that_makes_no_sense_is_wrong_usage(cli, interval):
    assert cli("top", f"--interval={interval}").code == exits.USAGE


def test_neither_torch_nor_nvml_is_loaded_for_the_cpu(cli, painter, lent):
    code = (
        "import sys; from lunashm.cli import run; assert run(['top']) == 0;"
        "sys.exit(' '.join({'torch', 'numpy', 'pynvml'} & set(sys.modules)) or None)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)


# -- as a log ----------------------------------------------------------------------------------------------------------


def test_csv_of_one_look(cli, painter, tmp_path):
    path = tmp_path / "log.csv"
    assert cli("top", "--once", "--csv", path).code == 0
    assert cli("top", "--once", "--csv", path, "--json").code == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["host", "client"] * 2
    assert int(rows[1]["pid"]) == painter.process.pid
    assert int(rows[1]["pss_nbytes"]) > int(rows[1]["private_nbytes"]) > 0
    assert rows[0]["time"] < rows[2]["time"]


def test_csv_of_another_kind_is_refused_before_anything_is_done(cli, painter, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("a,b\n")
    result = cli("top", "--csv", path, "--json")
    assert (result.code, result.json["error"]["code"]) == (exits.USAGE, "settings")
    assert str(path) in result.json["error"]["message"]
    assert path.read_text() == "a,b\n"
    assert cli("top", "--csv", tmp_path / "no" / "log.csv").code == exits.ERROR


class Log:
    """``top --csv --json`` in a process of its own; ``looks`` are its lines so far."""

    def __init__(self, runtime, path):
        self.path = path
        environment = os.environ | {"LUNASHM_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, *TOP, "--csv", str(path), "--json", "--interval", "0.1"], env=environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.looks = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.looks.append(json.loads(line))

    def states(self):
        """Of the last look."""
        return [host["state"] for host in self.looks[-1]["hosts"]] if self.looks else None

    def interrupt(self):
        """Its exit code, and what it said besides."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20), self.process.stderr.read()

    def close(self):
        self.process.kill()
        self.process.wait()
        self._reader.join(20)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def log(runtime, tmp_path):
    log = Log(runtime, tmp_path / "log.csv")
    yield log
    log.close()


def test_hosts_and_clients_come_and_go_while_it_logs(log, runtime, tmp_path):
    until(lambda: log.states() == [], "it waits where there is no host")
    path = checkpoint(tmp_path / "m.safetensors")
    host = Program([*SERVE, "--root", str(tmp_path)], runtime).start()
    try:
        until(lambda: log.states() == ["up"], "the host is seen")
        client = Program(["-c", CLIENT, str(path), json.loads(host.ready)["endpoint"]], runtime).start()
        until(lambda: log.looks[-1]["hosts"][0]["clients"] == 1, "the client is seen")
        client.end()
        until(lambda: log.looks[-1]["hosts"][0]["clients"] == 0, "and that it left")
        host.process.send_signal(signal.SIGSTOP)
        until(lambda: log.states() == ["host_timeout"], "a host that does not answer is seen")
        assert log.looks[-1]["hosts"][0]["processes"][0]["pss_nbytes"] > 0
        host.process.send_signal(signal.SIGCONT)
        until(lambda: log.states() == ["up"], "and that it does again")
    finally:
        host.end(signal.SIGKILL)
    until(lambda: log.states() in (["host_lost"], ["host_unavailable"]), "the host's death is seen")
    assert "start it again with: lunashm serve" in until(
        lambda: next((h["trouble"] for h in log.looks[-1]["hosts"] if h["state"] == "host_lost"), ""), "it is said"
    )
    again = Program([*SERVE, "--root", str(tmp_path)], runtime).start()
    try:
        until(lambda: log.states() == ["up"], "the next host is seen")
        assert log.looks[-1]["hosts"][0]["host"]["pid"] == again.process.pid
    finally:
        again.end()
    assert log.interrupt() == (0, "")
    with log.path.open() as file:
        states = {row["state"] for row in csv.DictReader(file) if row["row"] == "host"}
    assert {"up", "host_timeout", "host_lost"} <= states

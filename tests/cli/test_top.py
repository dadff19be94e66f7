"""What ``top`` shows of real hosts and clients: once, on a terminal, and as a log."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from lunashm.cli import exits
from tests.standin.build import environment
from tests.standin.peers import GPUS
from tests.waiting import until

from .conftest import CLIENT, ROOT, Program, checkpoint

SERVE = ["-m", "lunashm", "serve", "--json"]
TOP = ["-m", "lunashm", "top"]
ON_ITS_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from lunashm.cli import main
main()
"""
"""So that Ctrl-C and a resized window reach it as they do anywhere."""
LEFT_SCREEN = "\x1b[?1049l"
READER = """
import sys, lunashm.client
with lunashm.client.attach(sys.argv[1], label="reader") as model:
    total = sum(float(tensor.sum()) for tensor in model.state_dict().values())
    print(total, flush=True)
    sys.stdin.read()
"""


def large(path, nbytes=40_000_000):
    header = {"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x01" * nbytes)
    return path


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


# -- on a terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """``top`` on a terminal of its own."""

    SET_BY_SOME = ("COLUMNS", "LINES", "NO_COLOR")

    def __init__(self, runtime, *flags, columns=60, **variables):
        self._main, side = pty.openpty()
        self.resize(columns)
        environment = {name: value for name, value in os.environ.items() if name not in self.SET_BY_SOME}
        environment |= {"LUNASHM_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_ITS_TERMINAL, "top", *flags], env=environment | variables, cwd=ROOT,
            start_new_session=True, stdin=side, stdout=side, stderr=side,
        )  # fmt: skip
        os.close(side)
        self.output = ""

    def resize(self, columns):
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def read(self):
        """All it has written by now."""
        while select.select([self._main], [], [], 0)[0]:
            try:
                self.output += os.read(self._main, 1 << 16).decode()
            except OSError:  # the other side is closed
                break
        return self.output

    def end(self, number=None):
        """Ctrl-C, or a signal: its exit code, and what it left on the ordinary screen."""
        if number is None:
            os.write(self._main, b"\x03")
        else:
            self.process.send_signal(number)
        until(lambda: self.read() is not None and self.process.poll() is not None, "top ends")
        left = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.read().rpartition(LEFT_SCREEN)[2])
        return self.process.returncode, left.replace("\r\n", "\n")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._main)


@pytest.fixture
def terminal():
    running = []

    def start(runtime, *flags, **options):
        running.append(Terminal(runtime, *flags, **options))
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_ctrl_c_ends_with_0_and_the_last_table_stays(painter, lent, terminal):
    top = terminal(lent.runtime)
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    code, left = top.end()
    assert code == 0
    assert left.startswith(f"cpu: posix, host pid {lent.process.pid}")
    assert "painter" in left
    assert "Traceback" not in top.output
    assert max(map(len, left.splitlines())) <= 60


def test_being_terminated_gives_the_screen_back(painter, lent, terminal):
    top = terminal(lent.runtime, "--interval", "100")
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    code, left = top.end(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "painter" in left


def test_a_resized_window_is_drawn_anew_at_once(painter, lent, terminal):
    top = terminal(lent.runtime, "--interval", "100")
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    assert "LABEL" not in top.read(), "a narrow screen"
    top.resize(100)
    until(lambda: "LABEL" in top.read(), "it is drawn as wide as the window is now")
    assert top.end()[0] == 0


def test_no_colour_is_used_where_none_is_wanted(painter, lent, terminal):
    top = terminal(lent.runtime, NO_COLOR="1")
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    top.end()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", top.output)


def test_a_terminal_without_a_host_is_told_so_and_waits(terminal, runtime, tmp_path):
    top = terminal(runtime, "--interval", "0.1")
    until(lambda: "lunashm serve" in top.read(), "it says how to start one")
    host = Program([*SERVE, "--root", str(tmp_path)], runtime).start()
    until(lambda: f"host pid {host.process.pid}" in top.read().replace("\x1b[0m", ""), "it sees the host that starts")
    host.end()
    until(lambda: "is gone" in top.read(), "and that it went")
    code, left = top.end()
    assert code == 0
    assert "is gone" in left


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_host(runtime, tmp_path):
    command = [sys.executable, *SERVE, "--root", str(tmp_path), "--device", "cuda:1"]
    variables = environment(LUNASHM_RUNTIME_DIR=str(runtime))
    process = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline())["device"] == GPUS[1]
    yield process
    process.terminate()
    process.wait(20)
    process.stdout.close()


def look(runtime, nvml=True, **said):
    """``top --json`` on the stand-ins."""
    variables = {f"LUNASHM_STANDIN_NVML_{name}": value for name, value in said.items()}
    done = subprocess.run(
        [sys.executable, *TOP, "--json"], cwd=ROOT, capture_output=True, text=True, check=True,
        env=environment(nvml=nvml, LUNASHM_RUNTIME_DIR=str(runtime), **variables),
    )  # fmt: skip
    (host,) = json.loads(done.stdout)["hosts"]
    return host


GPU_CLIENT = """
import sys
from lunashm.client.session import session_for
from lunashm.paths import Endpoint
session = session_for(Endpoint.for_device(sys.argv[1]), kind="test", label="on a GPU")
held = session.attach(sys.argv[2], (), 60.0)
print("attached", flush=True)
sys.stdin.read()
"""


def test_a_gpus_memory_is_that_of_the_hosts_device(gpu_host, runtime, tmp_path):
    path = large(tmp_path / "large.safetensors")
    command = [sys.executable, "-c", GPU_CLIENT, GPUS[1], str(path)]
    variables = environment(LUNASHM_RUNTIME_DIR=str(runtime))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    client = subprocess.Popen(command, env=variables, cwd=ROOT, text=True, **pipes)
    try:
        assert client.stdout.readline() == "attached\n"
        listed = f"0:{gpu_host.pid}=1,1:{gpu_host.pid}=600000000,1:{client.pid}=-1"
        host = look(runtime, USED="0=111,1=5000000000", PROCESSES=listed)
    finally:
        client.communicate("")
    device = host["device"]
    assert (device["used_nbytes"], device["total_nbytes"], device["delta_nbytes"]) == (5 * 10**9, 80 * 10**9, 0)
    assert host["weights_nbytes"] >= 40_000_000
    assert device["beyond_nbytes"] == 5 * 10**9 - host["weights_nbytes"]
    own, other = host["processes"]
    assert (own["nvml_nbytes"], own["peak_nbytes"], own["unseen"]) == (600_000_000, 600_000_000, "")
    assert (other["nvml_nbytes"], other["unseen"]) == (None, "NVML has no figure for it")
    assert (other["shared_nbytes"], other["models"]) == (40_000_000, ["large.safetensors"])
    assert host["ram"] is None


@pytest.mark.parametrize(
    ("nvml", "said", "reason"),
    [(False, {}, "libnvidia-ml.so.1"), (True, {"FAIL": "nvmlInitWithFlags=9"}, "Driver Not Loaded")],
)
def test_a_gpu_without_nvml_is_shown_with_the_reason(gpu_host, runtime, nvml, said, reason):
    host = look(runtime, nvml, **said)
    assert (host["state"], host["device"]) == ("up", None)
    assert reason in host["unseen"]


def test_the_device_is_compared_with_what_it_had_before_the_host_came(runtime, tmp_path, terminal):
    """And what is the same all the time is 0."""
    variables = environment(nvml=True, LUNASHM_STANDIN_NVML_USED="1=5000000000", LUNASHM_RUNTIME_DIR=str(runtime))
    del variables["PYTHONPATH"]
    top = terminal(runtime, "--interval", "0.1", columns=100, **variables)
    until(lambda: "lunashm serve" in top.read(), "it watches")
    began = time.time()
    command = [*SERVE, "--root", str(tmp_path), "--device", "cuda:1"]
    variables = environment(LUNASHM_RUNTIME_DIR=str(runtime))
    host = subprocess.Popen([sys.executable, *command], env=variables, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        host.stdout.readline()
        until(lambda: "beyond the shared weights" in top.read(), "the device is shown")
        since = re.search(r"\+0 B since (\d\d:\d\d:\d\d), 5.00 GB beyond", top.read())
        assert since, top.read()
        assert since[1] <= time.strftime("%H:%M:%S", time.localtime(began))
    finally:
        host.terminate()
        host.wait(20)
        host.stdout.close()
    assert top.end()[0] == 0

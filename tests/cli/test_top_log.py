from __future__ import annotations

import csv

import pytest

from lunashm.cli.top_log import COLUMNS, Log
from lunashm.errors import SettingsError
from lunashm.usage import ProcessId
from lunashm.usage.account import HostUse, ProcessUse, RamUse

CLIENT = ProcessUse(ProcessId(2, 7, 5), "comfyui", 'a, "b"\nc', ("x.safetensors", "y"), 1, 2, 3, None, 4)
HOST = HostUse(
    endpoint="ipc:///cpu.sock", state="up", processes=(ProcessUse(ProcessId(1, 7), "host", "", ()), CLIENT), clients=1,
    weights_nbytes=9, ram=RamUse(5, 0, 6, 1, 7),
)  # fmt: skip
GONE = HostUse(endpoint="ipc:///gpu.sock", state="host_lost", trouble="gone")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.csv"


def write(path, *times):
    log = Log(path)
    for time in times:
        log.append(time, (HOST, GONE))
    log.close()


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_columns_keep_their_names_and_order():
    assert ",".join(COLUMNS) == (
        "time,row,endpoint,device,state,pid,kind,label,models,shared_nbytes,private_nbytes,pss_nbytes,nvml_nbytes,"
        "peak_nbytes,clients,weights_nbytes,total_nbytes,unshared_nbytes,device_used_nbytes,device_total_nbytes,"
        "device_delta_nbytes,device_beyond_nbytes"
    )


def test_a_look_is_a_row_for_each_host_and_each_client(path):
    write(path, "t0")
    host, client, gone = rows(path)
    assert (host["row"], host["pid"], host["state"], host["total_nbytes"], host["unshared_nbytes"]) == (
        "host", "1", "up", "5", "6"
    )  # fmt: skip
    assert (client["row"], client["pid"], client["models"], client["nvml_nbytes"]) == (
        "client", "2", "x.safetensors; y", ""
    )  # fmt: skip
    assert [client[f"{name}_nbytes"] for name in ("shared", "private", "pss", "peak")] == ["1", "2", "3", "4"]
    assert client["label"] == 'a, "b"\nc'
    assert (gone["row"], gone["state"], gone["total_nbytes"]) == ("host", "host_lost", "")


def test_a_look_is_in_the_file_before_the_next_one(path):
    log = Log(path)
    assert path.read_text() == ",".join(COLUMNS) + "\n"
    log.append("t0", (HOST,))
    assert len(rows(path)) == 2
    log.close()


def test_a_file_of_this_log_is_gone_on_with(path):
    write(path, "t0")
    write(path, "t1", "t2")
    assert [row["time"] for row in rows(path)] == ["t0"] * 3 + ["t1"] * 3 + ["t2"] * 3


def test_a_line_that_was_cut_off_spoils_no_other(path):
    write(path, "t0")
    path.write_text(path.read_text()[:-5])
    write(path, "t1")
    assert [row["time"] for row in rows(path)] == ["t0"] * 3 + ["t1"] * 3


@pytest.mark.parametrize("text", ["time,pid\n1,2\n", ",".join((*COLUMNS, "more")) + "\n", "x", "\n"])
def test_a_file_with_other_columns_is_left_as_it_is(path, text):
    path.write_text(text)
    with pytest.raises(SettingsError, match="other columns"):
        Log(path)
    assert path.read_text() == text

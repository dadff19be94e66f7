from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lunashm
from lunashm import errors
from lunashm.cli import exits, hosts

from .conftest import DEADLINE_S, ROOT


def test_torch_is_not_imported_for_the_command_line():
    code = "import sys, lunashm.cli; sys.exit(' '.join({'torch', 'numpy'} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE_S, cwd=ROOT)


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out) == (0, f"lunashm {lunashm.__version__}\n")


@pytest.mark.parametrize("arguments", [["frob"], ["show"], ["ps", "--frob"], ["load"], ["stop", "--timeout", "x"]])
def test_wrong_usage_is_2_and_a_json_value_where_one_is_wanted(cli, arguments):
    human = cli(*arguments)
    assert (human.code, human.out) == (exits.USAGE, "")
    assert "Error:" in human.err
    machine = cli(*arguments, "--json")
    assert machine.code == exits.USAGE
    assert machine.json["error"]["code"] == "usage"


@pytest.mark.parametrize("command", ["ps", "show x", "load x", "unload x", "clients", "status", "top", "stop"])
def test_without_a_host_every_command_says_how_to_start_one(cli, command):
    command = command.split()
    human = cli(*command)
    assert (human.code, human.out) == (exits.NO_HOST, "")
    assert "lunashm serve" in human.err
    machine = cli(*command, "--json")
    assert (machine.code, machine.err) == (exits.NO_HOST, "")
    assert machine.json["error"]["code"] == "host_unavailable"


@pytest.mark.parametrize("name", ["ps", "ls", "load", "serve"])
def test_a_setting_that_makes_no_sense_names_its_source(cli, monkeypatch, name):
    monkeypatch.setenv("LUNASHM_WAIT_S", "soon")
    result = cli(name, *(["x"] if name == "load" else []), "--json")
    assert result.code == exits.USAGE
    assert "LUNASHM_WAIT_S" in result.json["error"]["message"]


def test_a_flag_beats_the_variable_which_beats_the_file(cli, monkeypatch, tmp_path, runtime):
    def asked(*flags):
        return cli("ps", "--json", *flags).json["error"]["message"]

    (tmp_path / "lunashm.toml").write_text(f'endpoint = "ipc://{runtime}/file.sock"\n')
    assert f"{runtime}/file.sock" in asked()
    monkeypatch.setenv("LUNASHM_ENDPOINT", f"ipc://{runtime}/variable.sock")
    assert f"{runtime}/variable.sock" in asked()
    assert f"{runtime}/flag.sock" in asked("--endpoint", f"ipc://{runtime}/flag.sock")


def test_a_file_that_is_no_toml_is_named(cli, tmp_path):
    (tmp_path / "lunashm.toml").write_text("roots = [")
    result = cli("ps", "--json")
    assert result.code == exits.USAGE
    assert "lunashm.toml" in result.json["error"]["message"]


def test_a_defect_is_one_json_value_and_a_traceback_beside_it(cli, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("boo")

    monkeypatch.setattr(hosts, "all_endpoints", broken)
    result = cli("ps", "--json")
    assert result.code == exits.ERROR
    assert result.json["error"] == {"code": "internal", "message": "ZeroDivisionError: boo"}
    assert "Traceback" in result.err


@pytest.mark.parametrize("raised", [KeyboardInterrupt, errors.OutOfSharedMemory("full"), PermissionError("mine")])
def test_whatever_ends_a_command_is_told_in_json(cli, monkeypatch, raised):
    def ends(*arguments):
        raise raised

    monkeypatch.setattr(hosts, "all_endpoints", ends)
    result = cli("ps", "--json")
    expected = {KeyboardInterrupt: (130, "interrupted")}.get(raised)
    expected = expected or ((6, "out_of_shared_memory") if isinstance(raised, errors.LunashmError) else (1, "os"))
    assert (result.code, result.json["error"]["code"]) == expected


def test_a_reader_that_leaves_early_is_no_error_message():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m lunashm ls --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.stderr == ""

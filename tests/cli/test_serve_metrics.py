"""`serve --metrics`: a real host, real clients, and what a scraper sees of them."""

from __future__ import annotations

import json
import signal
import threading

import pytest

from lunashm.cli import exits
from tests.scraping import scrape
from tests.waiting import until

from .conftest import CLIENT, Program, checkpoint

SERVE = ["-m", "lunashm", "serve", "--json"]


@pytest.fixture
def host(runtime, tmp_path):
    program = Program([*SERVE, "--root", str(tmp_path), "--metrics", "0"], runtime).start()
    yield program
    assert program.end() == 0, program.log.read_text()
    assert "Traceback" not in program.log.read_text()


@pytest.fixture
def url(host):
    return json.loads(host.ready)["metrics"]


def shows(url, name, value, **labels):
    until(lambda: scrape(url).value(name, **labels) == value, f"{name} {labels} is {value}")


def test_a_life_of_a_host_in_figures(host, url, cli, runtime, tmp_path):
    path = checkpoint(tmp_path / "m.safetensors")
    assert cli("load", path).code == 0
    shows(url, "models", 1, state="ready")
    page = scrape(url)
    (model,) = cli("ps", "--json").json["models"]
    who = {"model": "m.safetensors", "digest": model["digest"][:12]}
    assert page.value("build_info", version=json.loads(host.ready)["version"], rung="posix", device="cpu") == 1
    assert page.value("model_bytes", **who) == model["nbytes"] == 3 * 64
    assert page.value("model_memory_bytes", **who) == model["memory_nbytes"]
    assert page.value("load_seconds_count") == 1
    assert page.value("load_bytes_total") == path.stat().st_size
    assert page.value("requests_total", type="Load") == 1
    assert page.values["process_resident_memory_bytes", frozenset()] > 10e6

    endpoint = json.loads(host.ready)["endpoint"]
    clients = [Program(["-c", CLIENT, str(path), endpoint], runtime).start() for _ in range(2)]
    shows(url, "leases", 2)
    page = scrape(url)
    assert (page.value("clients"), page.value("model_clients", **who)) == (2, 2)
    assert page.value("saved_bytes") == model["nbytes"]
    assert page.value("attach_seconds_count", waited="no") == 2
    assert 0 < page.value("attach_seconds_sum", waited="no") < 2
    assert page.total("leases_lost_total") == 0

    clients[0].end(signal.SIGKILL)
    shows(url, "leases_lost_total", 1, reason="process_ended")
    page = scrape(url)
    assert (page.value("clients"), page.value("leases"), page.value("saved_bytes")) == (1, 1, 0)

    assert cli("unload", "m.safetensors").code == exits.REFUSED
    assert cli("show", "nothing").code == exits.NOT_FOUND
    shows(url, "errors_total", 1, code="model_not_found")
    page = scrape(url)
    assert page.value("errors_total", code="model_in_use") == 1
    assert page.total("errors_total") == 2

    process = clients[1].process
    process.stdin.close()
    assert process.wait(60) == 0
    clients[1].end()
    shows(url, "leases", 0)
    assert scrape(url).total("leases_lost_total") == 1, "a lease that is given back is not lost"
    assert cli("unload", "m.safetensors").code == 0
    shows(url, "models", 0, state="ready")
    page = scrape(url)
    assert page.labels("model_bytes") == []
    assert page.value("errors_total", code="internal") == 0
    assert page.value("load_bytes_total") == path.stat().st_size, "what was counted stays"


def test_ready_line_says_where(runtime, tmp_path, monkeypatch):
    monkeypatch.setenv("LUNASHM_METRICS", "127.0.0.1:0")
    host = Program(["-m", "lunashm", "serve", "--root", str(tmp_path)], runtime).start()
    (url,) = [word.removeprefix("metrics=") for word in host.ready.split() if word.startswith("metrics=")]
    assert scrape(url).value("clients") == 0
    assert host.end(signal.SIGINT) == 0
    with pytest.raises(OSError, match="refused"):
        scrape(url)


def test_setting_of_the_file_may_be_a_number(runtime, tmp_path):
    (runtime / "lunashm.toml").write_text("metrics = 0\n")  # its working directory
    host = Program([*SERVE, "--root", str(tmp_path)], runtime).start()
    assert scrape(json.loads(host.ready)["metrics"]).value("clients") == 0
    assert host.end() == 0


def test_nothing_is_served_unasked(lent):
    assert json.loads(lent.ready)["metrics"] == ""


def test_port_in_use_ends_a_host_before_it_is_ready(host, url, cli, runtime):
    port = url.rpartition(":")[2].partition("/")[0]
    taken = cli("serve", "--json", "--endpoint", f"ipc://{runtime}/other.sock", "--metrics", port)
    assert taken.code == exits.USAGE
    assert taken.json["error"]["code"] == "settings"
    assert f"127.0.0.1:{port}: pid {host.process.pid} (" in taken.json["error"]["message"]
    assert not (runtime / "other.sock").exists()
    assert scrape(url).value("clients") == 0
    assert [thread for thread in threading.enumerate() if thread.name.startswith("lunashm")] == []


def test_second_host_hears_that_one_serves_rather_than_of_the_port(host, url, cli):
    port = url.rpartition(":")[2].partition("/")[0]
    assert cli("serve", "--json", "--metrics", port).code == exits.SERVING


@pytest.mark.parametrize("wrong", ["on", "70000", ":9400", "::1:9400", "no.such.host.invalid:9400"])
def test_what_is_no_address_is_refused(cli, wrong):
    result = cli("serve", "--json", "--metrics", wrong)
    assert result.code == exits.USAGE
    assert "metrics" in result.json["error"]["message"]


def test_other_address_is_warned_about(runtime, tmp_path):
    host = Program([*SERVE, "--root", str(tmp_path), "--metrics", "0.0.0.0:0"], runtime).start()
    assert host.end() == 0
    assert "WARNING metrics at 0.0.0.0:0 are open to the network, without authentication" in host.log.read_text()

from __future__ import annotations

from lunashm.cli import exits
from lunashm.cli import models as models_module
from lunashm.protocol import ModelInfo

from .conftest import checkpoint


def test_ps_lists_what_is_loaded_and_counts_clients(cli, models):
    cli("load", checkpoint(models / "a [b].safetensors"))
    value = cli("ps", "--json").json
    (model,) = value["models"]
    assert (model["name"], model["state"], model["clients"], model["saved"]) == ("a [b].safetensors", "ready", 0, 0)
    assert model["device"] == "cpu"
    assert value["saved_nbytes"] == 0
    lines = cli("ps").out.splitlines()
    assert lines[0].split() == ["NAME", "DIGEST", "SIZE", "DTYPE", "MEMORY", "CLIENTS", "SAVED", "UNTIL"]
    assert "a [b].safetensors" in lines[1]
    assert model["digest"][:12] in lines[1]
    assert lines[-1].startswith("saved 0 B: ")


def test_a_loading_model_is_shown_with_its_percentage_and_speed():
    model = ModelInfo(
        name="big", path="/big", digest="", generation=0, state="loading", rung="posix", dtypes={}, tensors=0,
        nbytes=4_000_000_000, memory_nbytes=0, loaded_nbytes=1_720_000_000, clients=0, saved=0, until="loading",
        load_s=1.0, rules=(),
    )  # fmt: skip
    assert models_module._row(model)[-1] == "loading 43% at 1.72 GB/s"
    assert models_module._state(model) == "loading 43% at 1.72 GB/s, 4.00 GB in all"
    assert models_module._row(model)[2] == "4.00 GB"


def test_show_tells_facts_metadata_and_tensors(cli, models):
    path = checkpoint(models / "shown.safetensors", tensors=2, metadata={"about": "[bold]x\x1b[31m"})
    cli("load", path)
    value = cli("show", "shown.safetensors", "--json").json
    assert value["model"]["tensors"] == 2
    assert value["metadata"]["about"] == "[bold]x\x1b[31m"
    assert value["source"]["path"] == str(path)
    assert "tensors" not in value
    named = cli("show", value["model"]["digest"][:8], "--tensors", "--json").json["tensors"]
    assert {"name": "layer1.weight", "dtype": "F32", "stored": "F32", "shape": [4, 4], "nbytes": 64} in named
    human = cli("show", "shown.safetensors", "--tensors").out
    assert "layer1.weight" in human
    assert "[bold]x" in human
    assert "\x1b" not in human


def test_unload_gives_the_memory_back(cli, models):
    cli("load", checkpoint(models / "gone.safetensors"))
    assert cli("unload", "gone.safetensors", "--json").json["freed"] is True
    missing = cli("unload", "gone.safetensors", "--json")
    assert (missing.code, missing.json["error"]["code"]) == (exits.NOT_FOUND, "model_not_found")
    assert cli("show", "gone.safetensors").code == exits.NOT_FOUND


def test_a_held_model_is_not_unloaded_and_its_clients_are_named(cli, painter):
    pid = painter.process.pid
    held = cli("show", "painted.safetensors", "--json").json["held_by"]
    assert [(lease["pid"], lease["label"]) for lease in held] == [(pid, "painter")]
    (client,) = cli("clients", "--json").json["clients"]
    assert client["info"]["pid"] == pid
    assert "painter" in cli("clients").out

    refused = cli("unload", "painted.safetensors")
    assert (refused.code, refused.out) == (exits.REFUSED, "")
    assert f"painter (pid {pid})" in refused.err

    forced = cli("unload", "painted.safetensors", "--force", "--json")
    assert (forced.code, forced.json["freed"]) == (0, False)
    assert [lease["pid"] for lease in forced.json["told"]] == [pid]


def test_status_is_for_people_and_programs(cli, models, lent):
    (host,) = cli("status", "--json").json["hosts"]
    assert host["host"]["pid"] == lent.process.pid
    assert {"uptime_s", "models", "clients", "leases", "shared_nbytes", "free_nbytes", "counters"} <= host.keys()
    assert f"pid {lent.process.pid}" in cli("status").out


def test_the_only_live_host_is_meant_unless_another_is_named(cli, models):
    assert cli("clients").out == "no clients are connected\n"
    assert cli("status", "--device", "cpu").code == exits.NO_HOST
    assert cli("stop", "--device", "cpu").code == exits.NO_HOST

from __future__ import annotations

import itertools
import os

from lunashm.cli.files import Scan

from .conftest import checkpoint


def names(scan):
    return [entry.name for entry in scan.files()]


def test_ls_shows_what_the_host_could_load_and_what_it_has(cli, models):
    checkpoint(models / "b.safetensors")
    checkpoint(models / "a.sft")
    (models / "c.ckpt").write_bytes(b"")
    cli("load", models / "b.safetensors")
    value = cli("ls", "--json").json
    assert [(file["name"], file["loaded"]) for file in value["files"]] == [("a.sft", False), ("b.safetensors", True)]
    assert value["complete"] is True
    assert value["files"][0]["size"] == (models / "a.sft").stat().st_size
    assert "2 files below" in cli("ls").out


def test_without_a_host_the_configured_roots_are_listed(cli, tmp_path, monkeypatch):
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        checkpoint(tmp_path / folder / f"{folder}.safetensors")
    monkeypatch.setenv("LUNASHM_ROOTS", f"{tmp_path}/one:{tmp_path}/two")
    result = cli("ls", "--json").json
    assert [file["name"] for file in result["files"]] == ["one.safetensors", "two.safetensors"]
    assert "no host is running" in cli("ls").out


def test_hidden_folders_and_virtual_environments_are_skipped(tmp_path):
    for folder in ("models/sub", ".cache", "env", "env/lib", "x/site-packages"):
        (tmp_path / folder).mkdir(parents=True)
        checkpoint(tmp_path / folder / f"{folder.replace('/', '-')}.safetensors")
    (tmp_path / "env" / "pyvenv.cfg").touch()
    assert names(Scan((str(tmp_path),))) == ["models-sub.safetensors"]


def test_links_lead_nowhere_outside_and_never_in_circles(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "loop").symlink_to(root)
    (root / "leak.safetensors").symlink_to(checkpoint(outside / "secret.safetensors"))
    (root / "dangling.safetensors").symlink_to(outside / "none")
    (root / "link.safetensors").symlink_to(checkpoint(root / "real.safetensors"))
    checkpoint(root / os.fsdecode(b"\xff.safetensors"))
    assert names(Scan((str(root),))) == ["link.safetensors", "real.safetensors"]


def test_a_file_below_two_roots_is_listed_once(tmp_path):
    (tmp_path / "sub").mkdir()
    checkpoint(tmp_path / "sub" / "a.safetensors")
    assert names(Scan((str(tmp_path), str(tmp_path / "sub")))) == ["a.safetensors"]


def test_a_search_ends_with_its_budget(tmp_path):
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        checkpoint(tmp_path / str(number) / f"{number}.safetensors")
    ticks = itertools.count()
    scan = Scan((str(tmp_path),), budget_s=3, clock=lambda: float(next(ticks)))
    assert names(scan) == ["0.safetensors", "1.safetensors"]
    assert not scan.complete

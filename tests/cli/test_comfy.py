from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import lunashm
from lunashm.cli import checkout as checkout_module
from lunashm.cli import comfy, exits
from lunashm.cli.checkout import MARKER, Checkout, Presence, outermost
from lunashm.cli.checks import comfyui as doctored
from lunashm.cli.checks.check import State, run


@pytest.fixture
def comfyui(tmp_path):
    """What makes a folder a ComfyUI checkout, and no more."""
    root = tmp_path / "ComfyUI"
    for folder in ("comfy", "custom_nodes", "models/checkpoints"):
        (root / folder).mkdir(parents=True)
    (root / "main.py").touch()
    (root / "comfyui_version.py").write_text('__version__ = "0.28.0"\n')
    return root


@pytest.fixture(autouse=True)
def extension(tmp_path, monkeypatch):
    """A stand-in for the installed extension, found the way the real one is."""
    package = tmp_path / "site" / "comfy_ext"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('the extension is found, never imported')\n")
    monkeypatch.delitem(sys.modules, "comfy_ext", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return package.resolve()


@pytest.fixture
def node(comfyui):
    return comfyui / "custom_nodes" / "lunashm"


def test_install_links_and_may_be_repeated(cli, comfyui, node, extension):
    first = cli("comfy", "install", comfyui, "--json").json
    assert (first["how"], first["changed"], first["target"]) == ("link", True, str(extension))
    assert node.resolve() == extension
    assert cli("comfy", "install", comfyui, "--json").json["changed"] is False
    assert cli("comfy", "uninstall", comfyui).code == 0
    assert not node.is_symlink()
    assert cli("comfy", "uninstall", comfyui).code == exits.NOT_FOUND
    assert (extension / "__init__.py").exists()


def test_a_stale_link_of_ours_is_replaced(cli, comfyui, node, extension):
    node.symlink_to("/gone/comfy_ext")
    assert cli("comfy", "install", comfyui, "--json").json["changed"] is True
    assert node.resolve() == extension


def test_a_copy_is_marked_and_replaced_by_the_next(cli, comfyui, node, extension):
    assert cli("comfy", "install", comfyui, "--copy", "--json").json["how"] == "copy"
    assert json.loads((node / MARKER).read_text())["version"] == lunashm.__version__
    assert not (node / "__pycache__").exists()
    (node / "old.py").touch()
    cli("comfy", "install", comfyui, "--copy")
    assert not (node / "old.py").exists()
    assert [entry.name for entry in node.parent.iterdir()] == ["lunashm"]
    cli("comfy", "install", comfyui)
    assert node.is_symlink()
    cli("comfy", "uninstall", comfyui)
    assert list(node.parent.iterdir()) == []


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("x"), lambda p: p.symlink_to("/etc")])
@pytest.mark.parametrize("command", [["install"], ["install", "--copy"], ["uninstall"]])
def test_what_is_not_ours_is_never_touched(cli, comfyui, node, make, command):
    make(node)
    before = node.lstat()
    result = cli("comfy", *command, comfyui, "--json")
    assert (result.code, result.json["error"]["code"]) == (exits.REFUSED, "refused")
    assert node.lstat() == before
    assert [entry.name for entry in node.parent.iterdir()] == ["lunashm"]


def test_a_folder_that_is_no_comfyui_is_refused_with_what_is_missing(cli, tmp_path, comfyui):
    (comfyui / "main.py").unlink()
    result = cli("comfy", "install", comfyui, "--json")
    assert result.code == exits.USAGE
    assert "main.py" in result.json["error"]["message"]


def test_a_file_system_without_links_gets_advice(cli, comfyui, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    result = cli("comfy", "install", comfyui)
    assert result.code == exits.ERROR
    assert "--copy" in result.err


def test_models_below_the_roots_need_no_flag(cli, comfyui):
    value = cli("comfy", "install", comfyui, "--json").json
    assert (value["roots_missing"], value["serve"]) == ([], "lunashm serve")


def test_models_elsewhere_are_named_with_the_roots_to_serve(cli, comfyui, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "site"))
    store = tmp_path / "big store"
    for folder in ("ckpt", "loras", "configured"):
        (store / folder).mkdir(parents=True)
    (comfyui / "models" / "unet").symlink_to(store / "ckpt")
    (comfyui / "extra_model_paths.yaml").write_text(
        f"a111:\n  base_path: {store}\n  is_default: true\n  loras: |\n    loras\n    none\n"
    )
    expected = [str(comfyui / "models"), str(store / "ckpt"), str(store / "loras")]
    value = cli("comfy", "install", comfyui, "--json").json
    assert value["roots_missing"] == expected
    assert f"--root '{store}/loras'" in value["serve"]
    human = cli("comfy", "install", comfyui).out
    assert value["serve"] in human
    monkeypatch.setenv("LUNASHM_ROOTS", f"{comfyui}:{store}/configured")
    value = cli("comfy", "install", comfyui, "--json").json
    assert value["roots_missing"] == expected[1:]
    assert f"--root '{store}/configured'" in value["serve"], "what is configured stays served"


def test_without_pyyaml_extra_paths_are_simply_not_seen(comfyui, monkeypatch):
    (comfyui / "extra_model_paths.yaml").write_text("a:\n  loras: /etc\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert Checkout.at(comfyui).model_folders() == [comfyui / "models"]


def test_a_virtual_environment_in_the_checkout_is_the_python_to_install_into(comfyui):
    checkout = Checkout.at(comfyui)
    assert comfy.pip_command(checkout).startswith("python -m pip install ")
    (comfyui / "venv" / "bin").mkdir(parents=True)
    (comfyui / "venv" / "bin" / "python").symlink_to(sys.executable)
    assert comfy.pip_command(checkout).startswith(f"{comfyui}/venv/bin/python -m pip install ")


@pytest.mark.parametrize(
    ("text", "version"),
    [('__version__ = "0.28.0"', (0, 28, 0)), ("__version__='1.2'", (1, 2)), ("nothing", ()), (None, ())],
)
def test_the_version_is_read_where_it_can_be(comfyui, text, version):
    (comfyui / "comfyui_version.py").unlink()
    if text is not None:
        (comfyui / "comfyui_version.py").write_text(text)
    assert Checkout.at(comfyui).version == version


def test_an_installation_without_the_extension_says_so(cli, comfyui, monkeypatch):
    monkeypatch.setattr(checkout_module, "PACKAGE", "comfy_ext_that_is_not_there")
    result = cli("comfy", "install", comfyui)
    assert result.code == exits.ERROR
    assert "reinstall" in result.err


def test_outermost_drops_duplicates_and_what_lies_inside():
    assert outermost(map(Path, ["/b/c", "/a", "/b", "/a", "/ab"])) == [Path("/a"), Path("/ab"), Path("/b")]


def checks(comfyui):
    return {check.name: check for check in run(doctored.tasks(str(comfyui)))}


def test_doctor_looks_at_a_checkout(cli, comfyui, node):
    assert checks(comfyui)["extension"].state is State.FAIL
    assert checks(comfyui)["extension and hosts"].state is State.SKIP
    cli("comfy", "install", comfyui)
    found = checks(comfyui)
    assert {found[name].state for name in ("comfyui", "comfyui python", "extension", "model folders")} == {State.OK}
    assert "0.28.0" in found["comfyui"].detail
    node.unlink()
    node.symlink_to("/elsewhere/comfy_ext")
    assert "another installation" in checks(comfyui)["extension"].detail
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.3.40"')
    assert checks(comfyui)["comfyui"].state is State.FAIL
    assert Checkout.at(comfyui).presence is Presence.LINK


def test_doctor_notices_a_copy_of_another_version(cli, comfyui, node, models, lent):
    cli("comfy", "install", comfyui, "--copy")
    assert checks(comfyui)["extension and hosts"].state is State.OK
    (node / MARKER).write_text('{"version": "0.0.1"}')
    found = checks(comfyui)
    assert found["extension"].state is State.FAIL
    assert found["extension"].fix.endswith("--copy")
    hosts = found["extension and hosts"]
    assert hosts.state is State.FAIL
    assert f"version 0.0.1, pid {lent.process.pid} (cpu) has {lunashm.__version__}" in hosts.detail


@pytest.fixture
def pack(node):
    """The extension as the registry's client puts it there: no marker of ours, its own metadata."""
    node.mkdir()
    project = f'[project]\nname = "lunashm"\nversion = "{lunashm.__version__}"\n'
    (node / "pyproject.toml").write_text(project)
    return node


@pytest.mark.parametrize("command", [["install"], ["install", "--copy"], ["uninstall"]])
def test_a_pack_that_something_else_installed_is_left_to_it(cli, comfyui, pack, command):
    result = cli("comfy", *command, comfyui)
    assert result.code == exits.REFUSED
    assert "not put there by `lunashm comfy install`" in result.err
    assert (pack / "pyproject.toml").is_file()


def test_doctor_takes_such_a_pack_for_what_it_is(comfyui, pack, models, lent):
    found = checks(comfyui)
    assert (found["extension"].state, found["extension and hosts"].state) == (State.OK, State.OK)
    assert "a node pack" in found["extension"].detail
    (pack / "pyproject.toml").write_text('[project]\nname = "lunashm"\nversion = "0.0.1"\n')
    found = checks(comfyui)
    assert (found["extension"].state, found["extension and hosts"].state) == (State.FAIL, State.FAIL)
    assert "version 0.0.1" in found["extension"].detail
    (pack / "pyproject.toml").write_text("[project\n")
    assert "is not lunashm's" in checks(comfyui)["extension"].detail


def test_doctor_looks_for_lunashm_in_comfyuis_own_environment(comfyui):
    (comfyui / "venv" / "bin").mkdir(parents=True)
    (comfyui / "venv" / "bin" / "python").symlink_to(sys.executable)
    assert checks(comfyui)["comfyui python"].state is State.WARN
    assert checks(comfyui)["comfyui python"].fix.startswith(f"{comfyui}/venv/bin/python -m pip install ")
    packages = comfyui / "venv" / "lib" / "python3.12" / "site-packages"
    (packages / "lunashm-0.0.1.dist-info").mkdir(parents=True)
    assert "has lunashm 0.0.1, this is" in checks(comfyui)["comfyui python"].detail
    (packages / "lunashm-0.0.1.dist-info").rename(packages / f"lunashm-{lunashm.__version__}.dist-info")
    assert checks(comfyui)["comfyui python"].state is State.OK


def test_doctor_of_no_checkout_fails_with_the_reason(cli, tmp_path):
    result = cli("doctor", "--comfyui", tmp_path)
    assert result.code == exits.ERROR
    assert "is no ComfyUI checkout" in result.out

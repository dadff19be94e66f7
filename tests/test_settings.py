from __future__ import annotations

from pathlib import Path

import pytest

from lunashm import settings
from lunashm.errors import SettingsError
from lunashm.settings import Settings, load


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """``lunashm.toml`` in the working directory."""
    return tmp_path / "lunashm.toml"


def test_defaults_apply_where_nothing_is_said() -> None:
    assert load(environ={}) == Settings()


def test_flag_beats_variable_beats_file_beats_default(toml: Path) -> None:
    toml.write_text('device = "from-file"\nwait_s = 1\nfallback = "fail"\n')
    environ = {"LUNASHM_DEVICE": "from-variable", "LUNASHM_WAIT_S": "2.5"}
    chosen = load({"device": "from-flag"}, environ)
    assert (chosen.device, chosen.wait_s, chosen.fallback, chosen.mode) == ("from-flag", 2.5, "fail", "auto")


def test_flag_of_none_and_empty_variable_say_nothing(toml: Path) -> None:
    toml.write_text('device = "from-file"\n')
    assert load({"device": None}, {"LUNASHM_DEVICE": ""}).device == "from-file"


def test_roots_are_a_path_list_in_the_variable() -> None:
    assert load(environ={"LUNASHM_ROOTS": "/a::/b c:"}).roots == ("/a", "/b c")


def test_empty_root_is_refused_because_it_would_mean_the_working_directory(toml: Path) -> None:
    toml.write_text('roots = ["/a", ""]\n')
    with pytest.raises(SettingsError, match="working directory"):
        load(environ={})


def test_file_in_the_working_directory_comes_before_the_users(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tmp_path / "config" / "lunashm" / "lunashm.toml"
    user.parent.mkdir(parents=True)
    user.write_text('device = "users"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert load(environ={}).device == "users"
    toml.write_text('device = "local"\n')
    assert load(environ={}).device == "local"


def test_config_variable_names_the_file_outright(toml: Path, tmp_path: Path) -> None:
    toml.write_text('device = "local"\n')
    named = tmp_path / "other.toml"
    named.write_text('device = "named"\n')
    assert load(environ={"LUNASHM_CONFIG": str(named)}).device == "named"
    with pytest.raises(SettingsError, match="no file"):
        load(environ={"LUNASHM_CONFIG": str(tmp_path / "missing.toml")})


@pytest.mark.parametrize(
    "text", ["colour = 1\n", 'mode = "sometimes"\n', "wait_s = -1\n", "wait_s = nan\n", "device =", "\xff"]
)
def test_error_in_the_file_names_the_file(toml: Path, text: str) -> None:
    toml.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=r"lunashm\.toml"):
        load(environ={})


def test_unreadable_file_is_an_error_of_ours(toml: Path) -> None:
    toml.symlink_to(toml.parent / "turned" / "away")
    assert load(environ={}) == Settings()  # a dangling link is no file
    toml.unlink()
    toml.mkdir()
    assert load(environ={}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [("LUNASHM_WAIT_S", "soon"), ("LUNASHM_WAIT_S", "-1"), ("LUNASHM_LEASE_TTL_S", "0"), ("LUNASHM_MEMORY", "tape")],
)
def test_error_in_a_variable_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load(environ={name: value})


def test_error_in_a_flag_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="fallback"):
        load({"fallback": "hope"}, {})


def test_working_directory_that_is_gone_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert settings.config_path({}) is None


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        ({"mode": "forcelocal"}, "use auto, force_daemon or force_local"),
        ({"falback": "wait"}, "did you mean fallback?"),
        ({"wait_s": "soon"}, "must be a number of seconds"),
        ({"roots": 3}, "must be a list of directories"),
    ],
)
def test_wrong_setting_is_named_with_what_would_be_right(table: dict[str, object], advice: str) -> None:
    with pytest.raises(SettingsError) as error:
        settings.load(table, {})
    assert advice in str(error.value)

from __future__ import annotations

import pytest

from lunashm.cli.checks import configured
from lunashm.cli.checks.check import State, Wanted


def test_settings_that_do_not_parse_fail_and_the_other_checks_are_made_for_the_defaults(tmp_path):
    (tmp_path / "lunashm.toml").write_text("mode = 'sometimes'")
    assert configured.look().state is State.FAIL
    assert "lunashm.toml" in configured.look().detail
    assert configured.wanted(None) == Wanted()


def test_the_device_of_the_flag_is_the_only_one_of_interest(monkeypatch):
    monkeypatch.setenv("LUNASHM_DEVICE", "cuda:3")
    monkeypatch.setenv("LUNASHM_MEMORY", "cuda-ipc")
    assert configured.wanted(None) == Wanted("cuda:3", "cuda-ipc", only=False)
    assert configured.wanted("cuda:1") == Wanted("cuda:1", "cuda-ipc", only=True)


@pytest.mark.parametrize(("memory", "device"), [("posix", "cuda:0"), ("cuda-vmm", "cpu")])
def test_memory_that_the_device_does_not_have_fails(monkeypatch, memory, device):
    monkeypatch.setenv("LUNASHM_MEMORY", memory)
    assert configured.look(device).state is State.FAIL
    assert "set memory to auto" in configured.look(device).fix

"""What the settings ask for: whether they make sense, and what the other checks are made for."""

from __future__ import annotations

from collections.abc import Iterator

from lunashm import settings
from lunashm.cli.checks.check import Check, State, Task, Wanted
from lunashm.errors import SettingsError
from lunashm.memory import CPU, ON_CPU, ON_GPU


def wanted(device: str | None) -> Wanted:
    """``device``: the only one that is to be looked at. Defaults where the settings make no sense."""
    try:
        chosen = settings.load({"device": device})
    except SettingsError:
        chosen = settings.Settings(device=device or CPU)
    return Wanted(_device(chosen), chosen.memory, only=device is not None)


def tasks(device: str | None) -> Iterator[Task]:
    yield Task("settings", lambda: look(device))


def look(device: str | None = None) -> Check:
    try:
        path = settings.config_path()
        chosen = settings.load({"device": device})
    except SettingsError as exc:
        return Check("settings", State.FAIL, exc.message, "correct it, or remove it to use the default")
    text = f"{path or 'no lunashm.toml'}; mode {chosen.mode}, device {chosen.device}, memory {chosen.memory}"
    possible = ON_CPU if _device(chosen) == CPU else ON_GPU
    if chosen.memory not in ("auto", *possible):
        text = f"{text}: there is no such memory on {chosen.device}"
        return Check("settings", State.FAIL, text, f"set memory to auto, {' or '.join(possible)}")
    return Check("settings", State.OK, text)


def _device(chosen: settings.Settings) -> str:
    """What a host would take, and every client but a ComfyUI on a GPU."""
    return CPU if chosen.device == settings.AUTO else chosen.device

"""Settings and where they come from: flag > ``LUNASHM_*`` variable > ``lunashm.toml`` > default.

``lunashm.toml`` is looked for in the working directory, then in the user's configuration directory
(``~/.config/lunashm``); ``LUNASHM_CONFIG`` names one outright.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import platformdirs

from lunashm.errors import SettingsError

AUTO = "auto"
"""The default of several settings."""

Mode = Literal["auto", "force_daemon", "force_local"]
Fallback = Literal["wait", "local", "fail"]
Patience = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Ttl = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Gigabytes = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``roots``: directories whose files a host may open. ``endpoint``: a control URL; empty means the device's own.

    ``device``: ``cpu``, ``cuda:N`` or a GPU's UUID. ``auto`` is ``cpu``, but in a ComfyUI that computes on a GPU: that
    asks the host of its GPU, and where there is none the one of the CPU's memory.
    ``fallback``: what a client does while the host is still loading; ``wait_s`` how long it waits at most.
    ``metrics``: where a host serves them, a port or an address with one; empty means nowhere.
    ``private_gb``: what patches of one model may copy into a ComfyUI's own memory, in 1e9 bytes.
    """

    device: str = AUTO
    endpoint: str = ""
    memory: Literal["auto", "posix", "memfd", "cuda-vmm", "cuda-ipc"] = "auto"
    roots: tuple[str, ...] = ()
    mode: Mode = "auto"
    fallback: Fallback = "wait"
    wait_s: Patience = 600.0
    lease_ttl_s: Ttl = 15.0
    private_gb: Gigabytes = 2.0
    metrics: int | str = ""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


_LISTS = {"roots"}


def config_path(environ: Mapping[str, str] | None = None) -> Path | None:
    """The ``lunashm.toml`` in force, or None."""
    named = (os.environ if environ is None else environ).get("LUNASHM_CONFIG")
    if named:
        if not Path(named).is_file():
            raise SettingsError(f"LUNASHM_CONFIG names {named}, which is no file")
        return Path(named)
    for candidate in (Path("lunashm.toml"), platformdirs.user_config_path("lunashm") / "lunashm.toml"):
        if candidate.is_file():
            return candidate.absolute()
    return None


def load(flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Merge all sources; a flag of None was not given. Raises SettingsError naming the source that is wrong."""
    environ = os.environ if environ is None else environ
    merged: dict[str, Any] = {}
    path = config_path(environ)
    if path is not None:
        merged.update(_from_toml(path))
    for field in Settings.__struct_fields__:
        text = environ.get(f"LUNASHM_{field.upper()}")
        if text is not None and text != "":
            merged[field] = [part for part in text.split(os.pathsep) if part] if field in _LISTS else text
            _convert({field: merged[field]}, f"variable LUNASHM_{field.upper()}")
    merged.update({key: value for key, value in (flags or {}).items() if value is not None})
    settings = _convert(merged, "settings")
    if "" in settings.roots:
        raise SettingsError("an empty root would mean the working directory; name it, or leave it out")
    return settings


def _from_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: {exc}") from exc
    _convert(table, str(path))
    return table


def _convert(table: Mapping[str, Any], source: str) -> Settings:
    try:
        return msgspec.convert(table, Settings, strict=False)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"{source}: {_advice(table, exc)}") from exc


def _advice(table: Mapping[str, Any], error: msgspec.ValidationError) -> str:
    """What msgspec found, in the words of whoever wrote the setting."""
    known = {field.name: field for field in msgspec.structs.fields(Settings)}
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}"
            return f"there is no setting {name!r}; {advice}"
    for name, value in table.items():
        try:
            msgspec.convert(value, known[name].type, strict=False)
        except msgspec.ValidationError:
            choices = get_args(known[name].type)
            if choices and all(isinstance(choice, str) for choice in choices):
                return f"{name} is {value!r}; use {', '.join(choices[:-1])} or {choices[-1]}"
            kinds = {float: "a number of seconds", tuple: "a list of directories"}
            return f"{name} is {value!r}; it must be {kinds.get(type(known[name].default), 'text')} ({error})"
    return str(error)

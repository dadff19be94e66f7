"""Settings and where they come from: flag > ``LUNASHM_*`` variable > ``lunashm.toml`` > default.

``lunashm.toml`` is looked for in the working directory, then in the user's configuration directory
(``~/.config/lunashm``); ``LUNASHM_CONFIG`` names one outright.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs

from lunashm.errors import SettingsError

Mode = Literal["auto", "force_daemon", "force_local"]
Fallback = Literal["wait", "local", "fail"]
Patience = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Ttl = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``roots``: directories whose files a host may open. ``endpoint``: a control URL; empty means the device's own.

    ``fallback``: what a client does while the host is still loading; ``wait_s`` how long it waits at most.
    """

    device: str = "cpu"
    endpoint: str = ""
    memory: Literal["auto", "posix"] = "auto"
    roots: tuple[str, ...] = ()
    mode: Mode = "auto"
    fallback: Fallback = "wait"
    wait_s: Patience = 600.0
    lease_ttl_s: Ttl = 15.0
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
        raise SettingsError(f"{source}: {exc}") from exc

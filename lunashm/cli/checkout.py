"""A ComfyUI checkout on disk: what it is, where its models are, whether our extension is in it. Reads, never writes."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lunashm import __version__
from lunashm.errors import LunashmError, SettingsError

NODE = "lunashm"
"""The extension's name in custom_nodes."""
MARKER = ".lunashm.json"
"""A file in every copy of the extension that lunashm made, naming the version it came from."""
PACKAGE = "comfy_ext"
SUPPORTED_FROM = (0, 3, 64)


class Presence(enum.Enum):
    """What lies at custom_nodes/lunashm. COPY is one that lunashm made, PACK one that something else did (the registry,
    ComfyUI-Manager, a person), FOREIGN anything but our extension."""

    ABSENT = "absent"
    LINK = "link"
    COPY = "copy"
    PACK = "pack"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Checkout:
    """``path`` is absolute and holds main.py, comfy/ and custom_nodes/."""

    path: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Checkout:
        """Raises SettingsError naming what is missing."""
        root = Path(path).expanduser().absolute()
        wanted = {"main.py": root / "main.py", "comfy/": root / "comfy", "custom_nodes/": root / "custom_nodes"}
        missing = [name for name, place in wanted.items() if not place.exists()]
        if missing:
            raise SettingsError(f"{root} is no ComfyUI checkout: it has no {', '.join(missing)}")
        return cls(root)

    @property
    def node(self) -> Path:
        return self.path / "custom_nodes" / NODE

    @property
    def presence(self) -> Presence:
        if self.node.is_symlink():
            ours = self.node.readlink().name == PACKAGE  # also where the target is gone
            return Presence.LINK if ours else Presence.FOREIGN
        if not self.node.exists():
            return Presence.ABSENT
        if (self.node / MARKER).is_file():
            return Presence.COPY
        return Presence.PACK if self._pack().get("name") == NODE else Presence.FOREIGN

    @property
    def copied_version(self) -> str:
        """Of a COPY or a PACK; empty where it does not say."""
        try:
            return str(json.loads((self.node / MARKER).read_text())["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return str(self._pack().get("version", ""))

    def _pack(self) -> dict[str, Any]:
        """[project] of what lies at custom_nodes/lunashm; empty for what is no pack."""
        try:
            project = tomllib.loads((self.node / "pyproject.toml").read_text()).get("project")
        except (OSError, ValueError):
            return {}
        return project if isinstance(project, dict) else {}

    @property
    def version(self) -> tuple[int, ...]:
        """ComfyUI's version, such as (0, 28, 0); empty where it cannot be read."""
        try:
            text = (self.path / "comfyui_version.py").read_text()
        except OSError:
            return ()
        found = re.search(r"""__version__\s*=\s*["'](\d+(?:\.\d+)*)""", text)
        return tuple(map(int, found[1].split("."))) if found else ()

    @property
    def pythons(self) -> list[Path]:
        """Interpreters of virtual environments in the checkout; ComfyUI may run with another."""
        places = (self.path / folder / "bin" / "python" for folder in ("venv", ".venv"))
        return [place for place in places if place.exists()]

    def model_folders(self) -> list[Path]:
        """Real paths of all folders it reads models from, none inside another."""
        models = self.path / "models"
        folders = [models, *(entry for entry in _entries(models) if entry.is_symlink() and entry.is_dir())]
        return outermost(folder.resolve() for folder in (*folders, *self._extra_folders()))

    def _extra_folders(self) -> list[Path]:
        """What extra_model_paths.yaml names, as ComfyUI reads it; nothing without PyYAML."""
        config = self.path / "extra_model_paths.yaml"
        try:
            yaml = importlib.import_module("yaml")
        except ImportError:
            return []
        try:
            sections = yaml.safe_load(config.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError, yaml.YAMLError) as exc:
            raise SettingsError(f"{config} cannot be read: {exc}") from exc
        found = [path for section in _tables(sections) for path in _section_folders(section, self.path)]
        return [path for path in found if path.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _tables(sections: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - whatever the file holds
    values = sections.values() if isinstance(sections, dict) else ()
    return [section for section in values if isinstance(section, dict)]


def _section_folders(section: dict[str, Any], here: Path) -> list[Path]:
    base = here / Path(os.path.expandvars(str(section.get("base_path") or ""))).expanduser()
    texts = [v for k, v in section.items() if k not in ("base_path", "is_default") and isinstance(v, str)]
    return [base / line.strip() for text in texts for line in text.splitlines() if line.strip()]


def outermost(folders: Iterable[Path]) -> list[Path]:
    """Without duplicates and without folders that lie inside another one."""
    unique = sorted(set(folders))
    return [folder for folder in unique if not any(other in folder.parents for other in unique)]


def extension() -> Path:
    """The comfy_ext package of this installation, found without importing it. Raises LunashmError."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in map(Path, places):
        if (place / "__init__.py").is_file():
            return place.resolve()
    raise LunashmError(f"this installation of lunashm has no {PACKAGE} package; reinstall lunashm")


def requirement() -> str:
    """What pip installs to get this very lunashm: the directory it was installed from, or the released version."""
    tree = extension().parent
    if (tree / "pyproject.toml").is_file():
        return str(tree)
    origin = json.loads(metadata.distribution("lunashm").read_text("direct_url.json") or "{}").get("url", "")
    return origin or f"lunashm=={__version__}"

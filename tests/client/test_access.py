"""A refused path is explained with what the client can see."""

from __future__ import annotations

from pathlib import Path

from lunashm.client.access import explained
from lunashm.errors import ModelNotFound, PathNotAllowed

REFUSAL = PathNotAllowed("outside the roots; --root /wrong")


def test_missing_file_is_called_missing(tmp_path: Path) -> None:
    error = explained(REFUSAL, str(tmp_path / "no.safetensors"))
    assert isinstance(error, ModelNotFound)


def test_link_names_the_folder_it_leads_to(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "a.safetensors"
    target.parent.mkdir()
    target.touch()
    link = tmp_path / "a.safetensors"
    link.symlink_to(target)
    assert f"--root {target.parent}," in str(explained(REFUSAL, str(link)))


def test_plain_file_keeps_the_hosts_words(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.touch()
    assert explained(REFUSAL, str(file)) is REFUSAL


def test_what_is_no_path_keeps_the_hosts_words() -> None:
    assert explained(REFUSAL, "/a\0b") is REFUSAL

"""What a LoRA's name means among the files there are."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_ext.nodes.lora_names import closest, find

FILES = [
    "Detail.safetensors", "anime/style.safetensors", "photo/deep/film v1.5.safetensors", "old/style2.pt", "style2.pt"
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Detail.safetensors", "Detail.safetensors"),
        ("Detail", "Detail.safetensors"),
        ("detail", "Detail.safetensors"),
        ("DETAIL.SAFETENSORS", "Detail.safetensors"),
        ("anime/style", "anime/style.safetensors"),
        ("anime\\style.safetensors", "anime/style.safetensors"),
        ("./anime//style", "anime/style.safetensors"),
        ("/anime/style", "anime/style.safetensors"),
        ("style", "anime/style.safetensors"),
        ("Style.safetensors", "anime/style.safetensors"),
        ("film v1.5", "photo/deep/film v1.5.safetensors"),
        ("Deep/Film v1.5", "photo/deep/film v1.5.safetensors"),
        ("style2", "style2.pt"),
    ],
)
def test_a_name_means_one_file(name: str, file: str) -> None:
    found = find(name, FILES)
    assert (found.file, found.others, found.doubt) == (file, (), "")


NO_NAMES = ["", "/", ".", "nothing", "detail.pt", "tail", "film", "nime/style", "../Detail", "anime/../Detail", "/x"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_a_file_finds_none(name: str) -> None:
    assert find(name, FILES).file is None


def test_windows_lists_with_backslashes_and_that_is_what_comes_back() -> None:
    assert find("anime/style", ["anime\\style.safetensors"]).file == "anime\\style.safetensors"


def test_one_letter_in_two_spellings_is_the_same_letter() -> None:
    assert find(unicodedata.normalize("NFD", "café"), [unicodedata.normalize("NFC", "café.safetensors")]).file


def test_of_several_the_choice_is_fixed_and_all_are_named() -> None:
    files = ["z/y/style.safetensors", "b/style.safetensors", "a/style.pt", "a/style.safetensors"]
    found = find("style", files)
    assert found.file == "a/style.safetensors"
    assert found == find("style", reversed(files))
    assert found.doubt == (
        "could be a/style.pt, a/style.safetensors, b/style.safetensors or z/y/style.safetensors; "
        "a/style.safetensors is used, write its folder and extension to be sure"
    )


def test_the_stricter_fit_is_no_doubt() -> None:
    assert find("style", ["Style.safetensors", "style.safetensors", "a/style.safetensors"]).others == ()
    assert find("style.pt", ["style.pt", "style.pt.safetensors"]).others == ()


def test_a_misspelt_name_has_a_closest_file() -> None:
    assert closest("sytle", FILES) == "anime/style.safetensors"
    assert closest("/", FILES) is closest("qqq", FILES) is None


paths = st.lists(st.text("aAb.", min_size=1, max_size=4), min_size=1, max_size=3).map("/".join)


@given(st.text("aAb./\\", max_size=12), st.lists(paths, unique=True, max_size=8))
def test_what_is_found_is_always_one_of_the_files(name: str, files: list[str]) -> None:
    found = find(name, files)
    assert {found.file, *found.others} <= {*files, None}
    assert found == find(name, files[::-1])


@given(st.data(), st.lists(paths.filter(lambda path: ".." not in path.split("/") and "." not in path.split("/")),
                           min_size=1, unique=True))  # fmt: skip
def test_a_files_own_name_always_means_that_file(data: st.DataObject, files: list[str]) -> None:
    file = data.draw(st.sampled_from(files))
    assert find(file, files).file == file
    assert find(file, files).others == ()

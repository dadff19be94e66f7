from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lunashm.errors import InvalidCheckpoint, LunashmError, ModelNotFound, PathNotAllowed, UnsupportedFormat
from lunashm.host import checkpoint
from lunashm.host.checkpoint import StoredTensor, parse_header, resolve
from lunashm.manifest import ITEMSIZE, MAX_RANK, nbytes_of
from tests import checkpoints

# -- which files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


def refusal(path: Path | str, root: Path) -> LunashmError:
    with pytest.raises(LunashmError) as caught:
        resolve(str(path), [str(root)])
    return caught.value


@pytest.mark.parametrize("name", ["a.safetensors", "b.sft", "C.SafeTensors"])
def test_file_below_a_root_is_allowed(root: Path, name: str) -> None:
    (root / "sub").mkdir()
    (root / "sub" / name).touch()
    assert resolve(f"{root}/sub/../sub/{name}", ["/elsewhere", str(root)]) == root / "sub" / name


def test_link_is_followed_before_the_roots_are_asked(root: Path, outside: Path) -> None:
    checkpoints.write(outside / "a.safetensors")
    (root / "link.safetensors").symlink_to(outside / "a.safetensors")
    (root / "folder").symlink_to(outside)
    (outside / "in.safetensors").symlink_to(root / "real.safetensors")
    checkpoints.write(root / "real.safetensors")
    assert isinstance(refusal(root / "link.safetensors", root), PathNotAllowed)
    assert isinstance(refusal(root / "folder" / "a.safetensors", root), PathNotAllowed)
    assert resolve(str(outside / "in.safetensors"), [str(root)]) == root / "real.safetensors"


@pytest.mark.parametrize(
    "path", ["", "a.safetensors", "./a.safetensors", "../models/a.safetensors", "/a\0.safetensors", "~/a.safetensors"]
)
def test_path_that_is_not_absolute_is_refused(root: Path, path: str) -> None:
    assert isinstance(refusal(path, root), PathNotAllowed)


def test_dots_do_not_lead_out_of_a_root(root: Path, outside: Path) -> None:
    checkpoints.write(outside / "a.safetensors")
    assert isinstance(refusal(f"{root}/../outside/a.safetensors", root), PathNotAllowed)
    assert isinstance(refusal(f"{root}-more/a.safetensors", root), PathNotAllowed)  # a prefix of text is no parent


def test_refusal_says_the_same_whatever_is_there(root: Path, outside: Path) -> None:
    """Files, folders, links and their targets outside the roots look alike: like nothing at all."""
    secret = outside / "secret-place"
    secret.mkdir()
    checkpoints.write(secret / "there.safetensors")
    (secret / "linked.safetensors").symlink_to("/etc/hostname")
    (outside / "alias").symlink_to(secret)
    before = str(refusal(outside / "alias" / "nothing.safetensors", root))
    for name in ("there", "linked", "missing"):
        for folder in ("alias", "secret-place", "not-there"):
            text = str(refusal(outside / folder / f"{name}.safetensors", root))
            assert text.replace(folder, "alias").replace(name, "nothing") == before
    (root / "link.safetensors").symlink_to(secret / "there.safetensors")
    assert "secret-place" not in str(refusal(root / "link.safetensors", root))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl", ".CKPT"])
def test_pickle_is_refused_with_the_reason(root: Path, suffix: str) -> None:
    error = refusal(root / f"model{suffix}", root)
    assert isinstance(error, UnsupportedFormat)
    assert "can run code" in str(error)


def test_pickle_behind_a_harmless_name_is_refused(root: Path) -> None:
    (root / "model.ckpt").touch()
    (root / "model.safetensors").symlink_to("model.ckpt")
    assert "pickle" in str(refusal(root / "model.safetensors", root))


@pytest.mark.parametrize("name", ["model.gguf", "model", ".safetensors"])
def test_other_formats_are_refused(root: Path, name: str) -> None:
    (root / name).touch()
    assert isinstance(refusal(root / name, root), UnsupportedFormat)


def test_link_to_a_content_addressed_store_is_known_by_its_own_name(root: Path) -> None:
    """As Hugging Face's cache keeps files: snapshots/REVISION/model.safetensors -> blobs/SHA256."""
    (root / "blobs").mkdir()
    checkpoints.write(root / "blobs" / "0a1b2c")
    (root / "model.safetensors").symlink_to("blobs/0a1b2c")
    real = resolve(str(root / "model.safetensors"), [str(root)])
    assert real == root / "blobs" / "0a1b2c"
    assert checkpoint.display_name(str(root / "model.safetensors"), real) == "model.safetensors"


@pytest.mark.parametrize("name", ["missing.safetensors", "a" * 300 + ".safetensors", "file/in/a.safetensors"])
def test_file_that_is_not_there_is_not_found(root: Path, name: str) -> None:
    (root / "file").touch()
    assert isinstance(refusal(root / name, root), ModelNotFound)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_regular_file_is_not_found(root: Path, make: Callable[[Path], None]) -> None:
    make(root / "odd.safetensors")
    assert isinstance(refusal(root / "odd.safetensors", root), ModelNotFound)
    with pytest.raises(ModelNotFound):
        checkpoint.read(root / "odd.safetensors")  # does not wait for a writer either


def test_loop_of_links_is_refused(root: Path) -> None:
    (root / "a.safetensors").symlink_to("b.safetensors")
    (root / "b.safetensors").symlink_to("a.safetensors")
    assert isinstance(refusal(root / "a.safetensors", root), ModelNotFound)


def test_name_that_no_message_can_hold_is_refused(root: Path) -> None:
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.safetensors")).touch()
    (root / "good.safetensors").symlink_to(os.fsdecode(b"\xff.safetensors"))
    assert "UTF-8" in str(refusal(root / "good.safetensors", root))


def test_file_that_vanishes_or_may_not_be_read_is_not_found(root: Path) -> None:
    for look in (checkpoint.identify, checkpoint.read):
        with pytest.raises(ModelNotFound, match="No such file"):
            look(root / "gone.safetensors")
    (root / "link.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(ModelNotFound):  # it was a real path when it was resolved: somebody put a link there since
        checkpoint.read(root / "link.safetensors")


# -- the header --------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tables = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(ITEMSIZE)), shapes),
    min_size=1,
    max_size=8,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def parse(header: bytes, data_nbytes: int = 0) -> tuple[tuple[StoredTensor, ...], dict[str, str]]:
    data_start = 8 + len(header)
    return parse_header(header, data_start=data_start, file_size=data_start + data_nbytes, name="m.safetensors")


def entry(dtype: Any = "F32", shape: Any = (4,), data_offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@given(tables, st.none() | st.dictionaries(texts, texts, max_size=3))
def test_header_that_is_written_is_read_back(
    table: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    header = checkpoints.header_of(table, metadata)[8:]
    data_nbytes = sum(nbytes_of(dtype, shape) for dtype, shape in table.values())
    tensors, read_metadata = parse(header, data_nbytes)
    assert {t.name: (t.dtype, t.shape) for t in tensors} == table
    assert read_metadata == (metadata or {})
    assert [t.start for t in tensors] == [8 + len(header), *(t.end for t in tensors[:-1])]
    assert tensors[-1].end == 8 + len(header) + data_nbytes


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_with_our_errors(header: bytes) -> None:
    with pytest.raises((InvalidCheckpoint, UnsupportedFormat)):
        parse(header)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([*ITEMSIZE]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), json_values | st.builds(entry, json_values)))
def test_arbitrary_json_is_refused_with_our_errors(table: dict[str, Any]) -> None:
    with pytest.raises((InvalidCheckpoint, UnsupportedFormat)):
        parse(json.dumps(table).encode())


@given(tables, st.data())
def test_damaged_header_is_refused_or_still_describes_the_whole_file(
    table: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    header = bytearray(checkpoints.header_of(table)[8:])
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    data_nbytes = sum(nbytes_of(dtype, shape) for dtype, shape in table.values())
    try:
        tensors, _ = parse(bytes(header), data_nbytes)
    except (InvalidCheckpoint, UnsupportedFormat):
        return
    assert sum(t.end - t.start for t in tensors) == data_nbytes
    assert all(t.end - t.start == nbytes_of(t.dtype, t.shape) for t in tensors)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"a": entry(data_offsets=[16, 32])}, "hole"),
        ({"a": entry(), "b": entry(data_offsets=[32, 48])}, "hole"),
        ({"a": entry(), "b": entry(data_offsets=[8, 24])}, "overlap"),
        ({"a": entry(), "b": entry()}, "overlap"),
        ({"a": entry(), "b": entry(data_offsets=[16, 32]), "c": entry(data_offsets=[32, 48])}, "the file at"),
        ({"a": entry()}, "the file at"),
        ({"a": entry(data_offsets=[16, 0])}, "-16 bytes"),
        ({"a": entry(data_offsets=[-16, 0])}, "malformed"),
        ({"a": entry(data_offsets=[0, 1 << 80])}, "malformed"),
        ({"a": entry(data_offsets=[0, 16, 32])}, "lacks"),
        ({"a": entry(data_offsets=[False, 16])}, "malformed"),
        ({"a": entry(data_offsets=[0.0, 16.0])}, "malformed"),
        ({"a": entry(data_offsets={"0": 0, "16": 16})}, "malformed"),
        ({"a": entry(shape=[-4])}, "malformed"),
        ({"a": entry(shape=[True, 4])}, "malformed"),
        ({"a": entry(shape="4")}, "malformed"),
        ({"a": entry(shape=[5])}, "but has 16 bytes"),
        ({"a": entry(shape=[1] * (MAX_RANK + 1))}, "dimensions"),
        ({"a": entry(shape=[1 << 40, 1 << 40])}, "no tensor can have"),
        ({"a": entry(shape=[0, 1 << 61, 1 << 61], data_offsets=[0, 0])}, "no tensor can have"),
        ({"a": entry(dtype=["F32"])}, "malformed"),
        ({"a": {"dtype": "F32"}}, "lacks"),
        ({"a": "F32"}, "lacks"),
        ({"a": None}, "lacks"),
        ({"a": [1, 2, 3]}, "lacks"),
        ({"__metadata__": {"epoch": 3}, "a": entry()}, "text to text"),
        ({"__metadata__": None, "a": entry()}, "text to text"),
        ({"__metadata__": {"half": "\ud800"}, "a": entry()}, "text to text"),
        ({"half \ud800": entry()}, "not valid Unicode"),
    ],
)
def test_header_that_contradicts_itself_or_the_file_is_refused_with_the_reason(table: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=why):
        parse(json.dumps(table).encode(), 32)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "appears twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_header_that_is_no_json_object_is_refused(header: bytes, why: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=why):
        parse(header)


def test_file_without_tensors_is_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="no tensors"):
        parse(b'{"__metadata__": {}}')


def test_dtype_we_cannot_serve_is_unsupported_and_named() -> None:
    with pytest.raises(UnsupportedFormat, match=r"m\.safetensors: 'a': dtype 'F4'"):
        parse(json.dumps({"a": entry(dtype="F4")}).encode(), 16)


def test_tensors_come_in_file_order_whatever_the_headers_order() -> None:
    table = {"late": entry(data_offsets=[16, 32]), "none": entry(shape=[0], data_offsets=[16, 16]), "early": entry()}
    tensors, _ = parse(json.dumps(table).encode(), 32)
    assert [tensor.name for tensor in tensors] == ["early", "none", "late"]


# -- the file ----------------------------------------------------------------------------------------------------------


def test_file_that_safetensors_wrote_is_read(root: Path) -> None:
    path = root / "m.safetensors"
    save_file({"w": torch.ones(3, 2, dtype=torch.bfloat16), "s": torch.tensor(1.0)}, path, {"format": "pt"})
    found = checkpoint.read(path)
    assert {t.name: (t.dtype, t.shape) for t in found.tensors} == {"w": ("BF16", (3, 2)), "s": ("F32", ())}
    assert found.metadata == {"format": "pt"}
    assert found.source == checkpoint.identify(path)
    assert found.data_start == path.stat().st_size - 16


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", bytes(8), b"\xff" * 8, (1 << 62).to_bytes(8, "little") + b"{}", b"\x80\x04pickle-like"],
)
def test_file_that_is_no_checkpoint_is_invalid(root: Path, content: bytes) -> None:
    (root / "m.safetensors").write_bytes(content)
    with pytest.raises(InvalidCheckpoint):
        checkpoint.read(root / "m.safetensors")


@pytest.mark.parametrize("change", [-1, 1])
def test_file_that_was_cut_or_grew_is_invalid(root: Path, change: int) -> None:
    path = root / "m.safetensors"
    checkpoints.write(path)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        checkpoint.read(path)


def test_reading_leaves_no_descriptor_open(root: Path) -> None:
    path = root / "m.safetensors"
    checkpoints.write(path)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint.read(path)
    path.write_bytes(b"12345678")
    with pytest.raises(InvalidCheckpoint):
        checkpoint.read(path)
    assert len(os.listdir("/proc/self/fd")) == before

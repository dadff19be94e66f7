"""Files' contents are read once, kept within a bound, and read again when the file changed."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lunashm.client.factors import READS, FactorCache
from lunashm.errors import SourceChanged
from tests import checkpoints

LIMIT = 100


class Reader:
    """Counts what it reads."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, path: str) -> bytes:
        self.read.append(path)
        return Path(path).read_bytes()


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def cache(reader: Reader) -> FactorCache[bytes]:
    return FactorCache(reader, len, LIMIT)


def test_file_is_read_once_whatever_it_is_called(cache, reader, tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"x" * 10)
    link.symlink_to(path)
    first = cache.get(path)
    assert cache.get(str(path)) is first
    assert cache.get(link) is first
    assert reader.read == [str(path)]
    assert (cache.nbytes, len(cache)) == (10, 1)


def test_reader_gets_the_name_that_was_asked_for(cache, reader, tmp_path):
    (tmp_path / "0a1b2c").write_bytes(b"x")
    (tmp_path / "style.safetensors").symlink_to("0a1b2c")
    cache.get(tmp_path / "style.safetensors")
    assert reader.read == [str(tmp_path / "style.safetensors")]


def test_changed_file_is_read_again_and_its_old_content_is_dropped(cache, reader, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    cache.get(path)
    path.write_bytes(b"y" * 20)
    assert cache.get(path) == b"y" * 20
    assert (cache.nbytes, len(cache)) == (20, 1)
    checkpoints.touch(path)
    cache.get(path)
    assert len(reader.read) == 3


def test_least_recently_used_goes_first(cache, reader, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"x" * 40)
    a, b, c = paths
    for path in (a, b, a, c, a):  # c pushes b out, not a
        cache.get(path)
    assert reader.read == [str(a), str(b), str(c)]
    cache.get(b)
    assert len(reader.read) == 4


def test_content_above_the_limit_is_handed_out_and_not_kept(cache, reader, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * LIMIT)
    large.write_bytes(b"x" * (LIMIT + 1))
    cache.get(small)
    assert len(cache.get(large)) == LIMIT + 1
    assert (cache.nbytes, len(cache)) == (LIMIT, 1)
    cache.get(large)
    assert reader.read.count(str(large)) == 2


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 60), st.booleans()), max_size=20))
def test_whatever_is_asked_the_bound_holds_and_contents_are_the_files(tmp_path_factory, uses):
    folder = tmp_path_factory.mktemp("cache")
    cache = FactorCache(Reader(), len, LIMIT)
    for number, (name, size, rewrite) in enumerate(uses):
        path = folder / name
        if rewrite or not path.exists():
            path.write_bytes(bytes([number]) * size)
            os.utime(path, ns=(number, number))
        assert cache.get(path) == path.read_bytes()
        assert cache.nbytes == sum(nbytes for _, _, nbytes in cache._kept.values()) <= LIMIT


def test_threads_that_want_one_file_read_it_once(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    started, go_on, reads = threading.Event(), threading.Event(), []

    def read(name: str) -> bytes:
        reads.append(name)
        started.set()
        assert go_on.wait(10)
        return Path(name).read_bytes()

    cache = FactorCache(read, len, LIMIT)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.get, path) for _ in range(8)]
        assert started.wait(10)
        go_on.set()
        contents = [future.result() for future in futures]
    assert len(reads) == 1
    assert all(content is contents[0] for content in contents)


def test_error_reaches_everyone_and_is_not_remembered(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    broken = True

    def read(name: str) -> bytes:
        if broken:
            raise ValueError("damaged")
        return b"whole"

    cache = FactorCache(read, len, LIMIT)
    with pytest.raises(ValueError, match="damaged"):
        cache.get(path)
    broken = False
    assert cache.get(path) == b"whole"
    with pytest.raises(FileNotFoundError):
        cache.get(tmp_path / "missing")


def test_file_that_is_being_written_is_read_until_it_holds_still(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    writes = 0

    def read(name: str) -> bytes:
        nonlocal writes
        content = Path(name).read_bytes()
        if writes:
            writes -= 1
            path.write_bytes(content + b"x")
        return content

    cache = FactorCache(read, len, LIMIT)
    writes = READS - 1
    assert cache.get(path) == path.read_bytes() == b"x" * READS
    path.write_bytes(b"new")
    writes = READS
    with pytest.raises(SourceChanged, match="changed each of"):
        cache.get(path)
    assert len(cache) == 0


def test_cleared_cache_reads_again(cache, reader, tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    cache.get(tmp_path / "a")
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)
    cache.get(tmp_path / "a")
    assert len(reader.read) == 2

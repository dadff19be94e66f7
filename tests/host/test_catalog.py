from __future__ import annotations

import pytest

from lunashm.errors import ModelNotFound
from lunashm.host.catalog import Catalog, Generation, State
from lunashm.manifest import DtypeRule, Manifest, Source, TensorSpec

AS_STORED = (DtypeRule("", ""),)
AS_F32 = (DtypeRule("", "F32"),)


class Books:
    """A catalog, and models put into it by path, content and dtype."""

    def __init__(self) -> None:
        self.catalog = Catalog()

    def add(self, path: str, content: str = "x", dtype: str = "F16", mtime: int = 1, size: int = 100) -> Generation:
        source = Source(path, size, mtime, 7)
        spec = TensorSpec("a", "F16", dtype, (4,), 0, 0, 16 if dtype == "F32" else 8)
        name = path.rpartition("/")[2]
        digest = content * 64
        rules = AS_F32 if dtype == "F32" else AS_STORED
        manifest = Manifest(name, digest, self.catalog.next_id(), source, rules, (spec,), (256,), {})
        generation = Generation(manifest, (), 0.5, "heap", {source})
        self.catalog.add(generation)
        return generation


@pytest.fixture
def books() -> Books:
    return Books()


# -- which bytes are where ---------------------------------------------------------------------------------------------


def test_file_as_it_was_is_current(books: Books) -> None:
    generation = books.add("/m/a.safetensors")
    assert books.catalog.current(Source("/m/a.safetensors", 100, 1, 7), AS_STORED) is generation
    for changed in (Source("/m/a.safetensors", 101, 1, 7), Source("/m/a.safetensors", 100, 2, 7),
                    Source("/m/a.safetensors", 100, 1, 8), Source("/m/b.safetensors", 100, 1, 7)):  # fmt: skip
        assert books.catalog.current(changed, AS_STORED) is None


def test_generation_serves_whoever_can_use_its_dtypes(books: Books) -> None:
    half = books.add("/m/a.safetensors")
    source = half.manifest.source
    assert books.catalog.current(source, (DtypeRule("", "F16"),)) is half
    assert books.catalog.current(source, (DtypeRule("other.", "F32"),)) is half
    assert books.catalog.current(source, AS_F32) is None
    single = books.add("/m/a.safetensors", dtype="F32")
    assert books.catalog.current(source, AS_F32) is single


def test_draining_generation_is_lent_no_more(books: Books) -> None:
    generation = books.add("/m/a.safetensors")
    generation.state = State.DRAINING
    source = generation.manifest.source
    assert books.catalog.current(source, AS_STORED) is None
    assert books.catalog.same_bytes("x" * 64, AS_STORED) is None
    assert books.catalog.suspects(Source("/m/b.safetensors", 100, 1, 7)) == frozenset()


def test_file_of_a_known_size_is_suspected_to_hold_known_bytes(books: Books) -> None:
    books.add("/m/a.safetensors", "x")
    books.add("/m/b.safetensors", "y", size=200)
    assert books.catalog.suspects(Source("/m/c.safetensors", 100, 5, 9)) == {"x" * 64}
    assert books.catalog.suspects(Source("/m/c.safetensors", 300, 5, 9)) == frozenset()


def test_file_whose_bytes_are_known_is_suspected_of_nothing(books: Books) -> None:
    """Else a load in other dtypes would look for its own bytes for ever."""
    generation = books.add("/m/a.safetensors", "x")
    assert books.catalog.suspects(generation.manifest.source) == frozenset()


def test_touched_file_is_learned_by_all_its_generations(books: Books) -> None:
    half, single = books.add("/m/a.safetensors"), books.add("/m/a.safetensors", dtype="F32")
    touched = Source("/m/a.safetensors", 100, 2, 7)
    assert books.catalog.learn(touched, "x" * 64) == []
    assert half.sources == single.sources == {touched}
    assert books.catalog.suspects(touched) == frozenset()


def test_second_file_with_the_same_bytes_joins_the_first(books: Books) -> None:
    generation = books.add("/m/a.safetensors")
    copy = Source("/m/copy.safetensors", 100, 9, 9)
    assert books.catalog.learn(copy, "x" * 64) == []
    assert books.catalog.current(copy, AS_STORED) is generation
    later = books.add("/m/a.safetensors", dtype="F32")
    assert books.catalog.current(copy, AS_F32) is later  # it serves every file with its bytes


def test_changed_file_leaves_its_generation_and_the_last_one_out_orphans_it(books: Books) -> None:
    generation = books.add("/m/a.safetensors", "x")
    books.catalog.learn(Source("/m/copy.safetensors", 100, 9, 9), "x" * 64)
    assert books.catalog.learn(Source("/m/a.safetensors", 100, 2, 7), "y" * 64) == []
    assert books.catalog.learn(Source("/m/copy.safetensors", 100, 10, 9), "y" * 64) == [generation]


def test_file_of_another_size_needs_no_digest_to_be_another(books: Books) -> None:
    generation = books.add("/m/a.safetensors", size=100)
    assert books.catalog.resized(Source("/m/a.safetensors", 100, 5, 7)) == []
    assert books.catalog.resized(Source("/m/a.safetensors", 101, 5, 7)) == [generation]


# -- names -------------------------------------------------------------------------------------------------------------


def names(books: Books) -> list[str]:
    return [books.catalog.names()[generation.id] for generation in books.catalog.all]


def test_model_is_called_by_its_file(books: Books) -> None:
    books.add("/m/a.safetensors")
    books.add("/m/b.safetensors", "y")
    assert names(books) == ["a.safetensors", "b.safetensors"]


def test_files_of_one_name_are_told_apart_by_their_folder(books: Books) -> None:
    books.add("/m/one/a.safetensors")
    books.add("/m/two/a.safetensors", "y")
    assert names(books) == ["one/a.safetensors", "two/a.safetensors"]


def test_later_generations_of_one_file_carry_their_number(books: Books) -> None:
    for content in "xyz":
        books.add("/m/a.safetensors", content)
    assert names(books) == ["a.safetensors", "a.safetensors@2", "a.safetensors@3"]


def test_names_are_always_distinct(books: Books) -> None:
    for path in ("/r1/x/a.sft", "/r2/x/a.sft", "/r1/x/a.sft", "/r3/a.sft"):
        books.add(path, path[2])
    assert len(set(names(books))) == 4


def test_model_is_found_by_name_path_link_and_digest(books: Books) -> None:
    generation = books.add("/m/a.safetensors", "f")
    books.catalog.learn(Source("/m/copy.safetensors", 100, 9, 9), "f" * 64)
    for name in ("a.safetensors", "/m/a.safetensors", "/m/copy.safetensors", "ffff"):
        assert books.catalog.find(name) is generation


def test_plain_name_stays_with_the_first_generation(books: Books) -> None:
    old, new = books.add("/m/a.safetensors", "x"), books.add("/m/a.safetensors", "y")
    assert books.catalog.find("a.safetensors") is books.catalog.find("/m/a.safetensors") is old
    assert books.catalog.find("a.safetensors@2") is new


def test_plain_name_means_what_is_lent_rather_than_what_drains(books: Books) -> None:
    half, single = books.add("/m/a.safetensors"), books.add("/m/a.safetensors", dtype="F32")
    single.state = State.DRAINING
    assert names(books) == ["a.safetensors", "a.safetensors@2"]
    assert books.catalog.find("a.safetensors") is books.catalog.find("/m/a.safetensors") is half


def test_name_that_fits_several_is_refused_with_all_of_them(books: Books) -> None:
    books.add("/m/one/a.safetensors", "x")
    books.add("/m/two/a.safetensors", "y")
    with pytest.raises(ModelNotFound, match=r"one/a\.safetensors, two/a\.safetensors; say which"):
        books.catalog.find("a.safetensors")


@pytest.mark.parametrize("name", ["", "b.safetensors", "xxx", "m/a.safetensors"])
def test_name_that_fits_nothing_is_refused_with_what_there_is(books: Books, name: str) -> None:
    books.add("/m/a.safetensors")
    with pytest.raises(ModelNotFound, match=r"loaded: a\.safetensors"):
        books.catalog.find(name)


def test_description_counts_what_sharing_saves(books: Books) -> None:
    generation = books.add("/m/a.safetensors")
    info = books.catalog.describe(generation, clients=4)
    assert (info.nbytes, info.clients, info.saved, info.dtypes, info.until) == (8, 4, 24, {"F16": 8}, "unload")
    assert books.catalog.describe(generation, clients=0).saved == 0
    generation.state = State.DRAINING
    assert books.catalog.describe(generation, clients=1).until == "last detach"

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunashm.errors import InvalidCheckpoint, UnsupportedFormat
from lunashm.manifest import (
    ALIGNMENT,
    CONVERTIBLE,
    ITEMSIZE,
    MAX_RANK,
    DtypeRule,
    Manifest,
    RuleBook,
    Source,
    TensorSpec,
    aligned,
    check_rules,
    nbytes_of,
    validate,
)

SOURCE = Source("/models/m.safetensors", 100, 1, 2)


def manifest(*tensors: TensorSpec, segments: tuple[int, ...] = (1024,)) -> Manifest:
    return Manifest("m.safetensors", "0" * 64, 1, SOURCE, (), tensors, segments, {})


def spec(name: str = "a", dtype: str = "F32", shape: tuple[int, ...] = (4,), **changes: int) -> TensorSpec:
    values = {"segment": 0, "offset": 0, "nbytes": 16} | changes
    return TensorSpec(name, dtype, dtype, shape, **values)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_nbytes_of_counts_elements(dtype: str) -> None:
    assert nbytes_of(dtype, (3, 5)) == 15 * ITEMSIZE[dtype]
    assert nbytes_of(dtype, ()) == ITEMSIZE[dtype]
    assert nbytes_of(dtype, (7, 0)) == 0


def test_unknown_dtype_is_unsupported() -> None:
    with pytest.raises(UnsupportedFormat, match="F4"):
        nbytes_of("F4", (2,))


@pytest.mark.parametrize("shape", [(-1,), (1 << 61, 1 << 61), (0, 1 << 61, 1 << 61), (1,) * (MAX_RANK + 1)])
def test_shape_that_no_tensor_can_have_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidCheckpoint):
        nbytes_of("F32", shape)


@given(st.integers(0, 1 << 60))
def test_aligned_is_the_next_multiple(offset: int) -> None:
    result = aligned(offset)
    assert result % ALIGNMENT == 0
    assert 0 <= result - offset < ALIGNMENT


# -- rules -------------------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(["", *sorted(CONVERTIBLE)])
prefixes = st.text("ab.", max_size=4)
rule_tables = st.dictionaries(prefixes, dtypes, max_size=6)


def rules_of(table: dict[str, str]) -> tuple[DtypeRule, ...]:
    return check_rules(DtypeRule(prefix, dtype) for prefix, dtype in table.items())


@given(rule_tables, st.text("ab.", max_size=8))
def test_the_longest_matching_prefix_decides(table: dict[str, str], name: str) -> None:
    matching = [prefix for prefix in table if name.startswith(prefix)]
    expected = table[max(matching, key=len)] if matching else None
    assert RuleBook(rules_of(table)).wanted(name) == expected


@given(rule_tables)
def test_rules_have_one_normal_form(table: dict[str, str]) -> None:
    backwards = dict(reversed(table.items()))
    assert rules_of(table) == rules_of(backwards)
    assert check_rules([*rules_of(table), *rules_of(table)]) == rules_of(table)


def test_contradicting_rules_are_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="two dtypes"):
        check_rules([DtypeRule("unet.", "F16"), DtypeRule("unet.", "F32")])


@pytest.mark.parametrize("dtype", ["I64", "F8_E8M0", "float32", "U8"])
def test_rule_for_a_dtype_that_cannot_be_converted_to_is_refused(dtype: str) -> None:
    with pytest.raises(UnsupportedFormat, match="choose one of"):
        check_rules([DtypeRule("", dtype)])


def test_integers_are_never_converted() -> None:
    book = RuleBook([DtypeRule("", "F16")])
    assert book.resolve("position_ids", "I64") == "I64"
    assert book.resolve("weight", "F32") == "F16"


def test_tensor_that_no_rule_speaks_of_may_come_in_any_dtype() -> None:
    tensors = [TensorSpec("vae.x", "F16", "F32", (1,), 0, 0, 4), TensorSpec("unet.x", "F16", "BF16", (1,), 0, 256, 2)]
    assert RuleBook([DtypeRule("vae.", "F32")]).satisfied_by(tensors)
    assert RuleBook([DtypeRule("unet.", "BF16")]).satisfied_by(tensors)
    assert not RuleBook([DtypeRule("", "F32")]).satisfied_by(tensors)
    assert not RuleBook([DtypeRule("vae.", "")]).satisfied_by(tensors)


@given(rule_tables, st.lists(st.tuples(st.text("ab.", max_size=6), st.sampled_from(sorted(ITEMSIZE))), max_size=8))
def test_what_rules_made_satisfies_those_rules(table: dict[str, str], names: list[tuple[str, str]]) -> None:
    book = RuleBook(rules_of(table))
    tensors = [TensorSpec(name, stored, book.resolve(name, stored), (), 0, 0, 0) for name, stored in names]
    assert book.satisfied_by(tensors)


# -- validation --------------------------------------------------------------------------------------------------------


def test_sound_manifest_is_valid() -> None:
    validate(manifest(spec("a"), spec("b", offset=256), spec("empty", shape=(0, 3), nbytes=0, offset=1024)))


@pytest.mark.parametrize(
    "bad",
    [
        spec(nbytes=17),
        spec(shape=(-4,), nbytes=-16),
        spec(segment=1),
        spec(segment=-1),
        spec(offset=1024),
        spec(offset=-256),
        spec(offset=100),
        spec(shape=(1 << 61, 8)),
    ],
)
def test_tensor_outside_its_segment_is_refused(bad: TensorSpec) -> None:
    with pytest.raises(InvalidCheckpoint):
        validate(manifest(bad))


def test_name_given_twice_is_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="twice"):
        validate(manifest(spec("a"), spec("a", offset=256)))


@given(
    st.lists(
        st.builds(
            TensorSpec,
            st.text(max_size=3),
            st.sampled_from(["F32", "I8", "??"]),
            st.sampled_from(["F32", "I8", "??"]),
            st.lists(st.integers(-2, 1 << 63), max_size=3).map(tuple),
            st.integers(-1, 2),
            st.integers(-512, 2048),
            st.integers(-16, 2048),
        ),
        max_size=4,
    )
)
def test_any_manifest_is_valid_or_refused_with_our_errors(tensors: list[TensorSpec]) -> None:
    try:
        validate(manifest(*tensors))
    except (InvalidCheckpoint, UnsupportedFormat):
        return
    for tensor in tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= 1024


def test_manifest_round_trips_through_msgpack() -> None:
    before = manifest(spec("a"), spec("b", offset=256))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(before), type=Manifest) == before
    assert before.nbytes == 32

"""Cutting is arithmetic: what a block's writes say is compared with the plan of the tensors themselves."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunashm.host.blocks import LEAST_NBYTES, Block, Write, cut, cut_plainly
from lunashm.host.checkpoint import Checkpoint, StoredTensor
from lunashm.host.loader import Layout, plan
from lunashm.manifest import CONVERTIBLE, ITEMSIZE, DtypeRule, Source

Shape = tuple[str, int]
"""Dtype and number of elements."""


def checkpoint_of(tensors: list[Shape], data_start: int = 100) -> Checkpoint:
    stored, position = [], data_start
    for number, (dtype, count) in enumerate(tensors):
        end = position + count * ITEMSIZE[dtype]
        stored.append(StoredTensor(f"t{number}", dtype, (count,), position, end))
        position = end
    return Checkpoint(Source("/m", position, 0, 0), tuple(stored), {}, data_start)


def blocks_of(checkpoint: Checkpoint, block_nbytes: int, target: str = "") -> tuple[list[Block], Layout]:
    layout = plan(checkpoint, (DtypeRule("", target),))
    return list(cut(checkpoint, layout.specs, block_nbytes)), layout


def test_tensors_that_lie_alike_in_file_and_segment_are_one_write() -> None:
    blocks, _ = blocks_of(checkpoint_of([("F32", 64), ("F16", 256), ("U8", 256)]), 4096)
    assert blocks == [Block(0, 1124, (Write(100, 1024, 0),))]


def test_padding_in_the_segment_parts_two_writes() -> None:
    blocks, _ = blocks_of(checkpoint_of([("F32", 65), ("F32", 64)]), 4096)
    assert blocks[0].writes == (Write(100, 260, 0), Write(360, 256, 512))


def test_header_is_read_and_written_nowhere() -> None:
    blocks, _ = blocks_of(checkpoint_of([("U8", 50)], data_start=1000), 400)
    assert [(block.start, block.nbytes) for block in blocks] == [(0, 400), (400, 400), (800, 250)]
    assert [block.writes for block in blocks] == [(), (), (Write(200, 50, 0),)]


def test_tensor_that_is_converted_is_cut_between_elements() -> None:
    blocks, _ = blocks_of(checkpoint_of([("F64", 10)], data_start=9), 32, "F16")
    assert [(block.start, block.nbytes) for block in blocks] == [(0, 25), (25, 32), (57, 32)]
    assert blocks[0].writes == (Write(9, 16, 0, "F64", "F16"),)
    assert blocks[1].writes == (Write(0, 32, 4, "F64", "F16"),)


def test_tensor_that_is_kept_is_cut_anywhere() -> None:
    blocks, _ = blocks_of(checkpoint_of([("F64", 10)], data_start=9), 32)
    assert [block.nbytes for block in blocks] == [32, 32, 25]


def test_converted_tensors_are_written_one_by_one() -> None:
    blocks, _ = blocks_of(checkpoint_of([("F16", 64), ("F16", 64), ("I64", 32), ("I64", 32)]), 4096, "F32")
    assert [(w.nbytes, w.offset, w.converts) for w in blocks[0].writes] == [
        (128, 0, True), (128, 256, True), (512, 512, False)
    ]  # fmt: skip


def test_block_that_may_not_hold_an_element_is_refused() -> None:
    with pytest.raises(ValueError, match="may not hold one element"):
        blocks_of(checkpoint_of([("F64", 1)]), LEAST_NBYTES - 1)


@given(
    tensors=st.lists(st.tuples(st.sampled_from(sorted(ITEMSIZE)), st.integers(0, 200)), min_size=1, max_size=12),
    data_start=st.integers(8, 300),
    block_nbytes=st.integers(LEAST_NBYTES, 1000),
    target=st.sampled_from(["", *sorted(CONVERTIBLE)]),
)
def test_every_byte_is_read_once_and_every_element_placed_once(
    tensors: list[Shape], data_start: int, block_nbytes: int, target: str
) -> None:
    checkpoint = checkpoint_of(tensors, data_start)
    blocks, layout = blocks_of(checkpoint, block_nbytes, target)
    assert blocks[0].start == 0
    assert all(one.start + one.nbytes == two.start for one, two in pairwise(blocks))
    assert blocks[-1].start + blocks[-1].nbytes == checkpoint.source.size
    assert all(0 < block.nbytes <= block_nbytes for block in blocks)
    placed: dict[int, int] = {}
    for block in blocks:
        for write in block.writes:
            assert write.start >= 0 and write.start + write.nbytes <= block.nbytes
            step = ITEMSIZE[write.stored] if write.converts else 1
            width = ITEMSIZE[write.dtype] if write.converts else 1
            assert write.nbytes % step == 0
            for index in range(write.nbytes // step):
                source = block.start + write.start + index * step
                assert source not in placed
                placed[source] = write.offset + index * width
    expected = {}
    for tensor, spec in zip(checkpoint.tensors, layout.specs, strict=True):
        converts = tensor.dtype != spec.dtype
        step, width = (ITEMSIZE[tensor.dtype], ITEMSIZE[spec.dtype]) if converts else (1, 1)
        for index in range((tensor.end - tensor.start) // step):
            expected[tensor.start + index * step] = spec.offset + index * width
    assert placed == expected


@given(nbytes=st.integers(0, 500), block_nbytes=st.integers(1, 100))
def test_file_that_goes_nowhere_is_cut_end_to_end(nbytes: int, block_nbytes: int) -> None:
    blocks = list(cut_plainly(nbytes, block_nbytes))
    assert sum(block.nbytes for block in blocks) == nbytes
    assert [block.start for block in blocks] == list(range(0, nbytes, block_nbytes))
    assert all(0 < block.nbytes <= block_nbytes and not block.writes for block in blocks)

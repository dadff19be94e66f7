"""How a file is cut into blocks, and where the bytes of each go. Arithmetic alone: reads nothing, writes nothing.

Blocks lie end to end and cover the whole file, header included, so that their bytes in this order are what is
digested. Tensors that lie behind each other in the segment as in the file are one write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lunashm.host.checkpoint import Checkpoint, StoredTensor
from lunashm.manifest import ITEMSIZE, TensorSpec

LEAST_NBYTES = max(ITEMSIZE.values())
"""A block holds at least one element of whatever dtype."""


@dataclass(frozen=True, slots=True)
class Write:
    """``nbytes`` of a block, from ``start`` bytes into it, belong at ``offset`` of the segment.

    Where ``stored`` and ``dtype`` differ they are whole elements, to be converted from one to the other.
    """

    start: int
    nbytes: int
    offset: int
    stored: str = ""
    dtype: str = ""

    @property
    def converts(self) -> bool:
        return self.stored != self.dtype


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of the file, from ``start``."""

    start: int
    nbytes: int
    writes: tuple[Write, ...] = ()


def cut(checkpoint: Checkpoint, specs: Sequence[TensorSpec], block_nbytes: int) -> Iterator[Block]:
    """The whole file in blocks of at most ``block_nbytes``; ``specs`` say where its tensors go, in file order.

    A cut that would split an element which is converted is made before it.
    """
    if block_nbytes < LEAST_NBYTES:
        raise ValueError(f"a block of {block_nbytes} bytes may not hold one element ({LEAST_NBYTES} bytes)")
    pairs = list(zip(checkpoint.tensors, specs, strict=True))
    size = checkpoint.source.size
    start = first = 0
    while start < size:
        end = min(start + block_nbytes, size)
        while first < len(pairs) and pairs[first][0].end <= start:
            first += 1
        writes: list[Write] = []
        for index in range(first, len(pairs)):
            tensor, spec = pairs[index]
            if tensor.start >= end:
                break
            if tensor.end > end:  # only the last tensor of a block can be split
                end = _before_element(tensor, spec, end)
            if max(tensor.start, start) < min(tensor.end, end):
                _add(writes, _part(tensor, spec, start, end))
        yield Block(start, end - start, tuple(writes))
        start = end


def cut_plainly(nbytes: int, block_nbytes: int) -> Iterator[Block]:
    """A file whose bytes go nowhere."""
    for start in range(0, nbytes, block_nbytes):
        yield Block(start, min(block_nbytes, nbytes - start))


def _before_element(tensor: StoredTensor, spec: TensorSpec, end: int) -> int:
    if tensor.dtype == spec.dtype:
        return end
    return end - (end - tensor.start) % ITEMSIZE[tensor.dtype]


def _part(tensor: StoredTensor, spec: TensorSpec, start: int, end: int) -> Write:
    """What of a tensor lies between ``start`` and ``end`` of the file, in a block that begins at ``start``."""
    here, there = max(tensor.start, start), min(tensor.end, end)
    if tensor.dtype == spec.dtype:
        return Write(here - start, there - here, spec.offset + here - tensor.start)
    elements = (here - tensor.start) // ITEMSIZE[tensor.dtype]
    offset = spec.offset + elements * ITEMSIZE[spec.dtype]
    return Write(here - start, there - here, offset, tensor.dtype, spec.dtype)


def _add(writes: list[Write], part: Write) -> None:
    """Append, or prolong the last write where ``part`` follows it in the block and in the segment."""
    if writes:
        last = writes[-1]
        follows = part.start - last.start == part.offset - last.offset == last.nbytes
        if follows and not last.converts and not part.converts:
            writes[-1] = replace(last, nbytes=last.nbytes + part.nbytes)
            return
    writes.append(part)

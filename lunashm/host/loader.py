"""From file to frozen segment: one pass, no second copy. Knows no clients.

Reader threads fill a ring of staging buffers from the file, block by block, and put each block's tensors in place,
converting where a rule asks for it; the caller's thread digests the same buffers meanwhile, in file order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from blake3 import blake3

from lunashm.host.blocks import Block, Write, cut, cut_plainly
from lunashm.host.checkpoint import Checkpoint
from lunashm.host.pace import Pace
from lunashm.host.ring import Ring
from lunashm.host.source_file import open_source
from lunashm.manifest import ITEMSIZE, DtypeRule, RuleBook, Source, TensorSpec, aligned, nbytes_of
from lunashm.memory import CPU, Rung, Segment
from lunashm.memory.files import plain_staging

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from the loading thread; raises LoadCancelled to stop the load."""


@dataclass(frozen=True)
class Layout:
    """Where each tensor goes and as what, in file order."""

    specs: tuple[TensorSpec, ...]
    nbytes: int


@dataclass(frozen=True)
class LoadedSegment:
    segment: Segment
    digest: str


def plan(checkpoint: Checkpoint, rules: tuple[DtypeRule, ...]) -> Layout:
    """Pack all tensors into one segment, each at a multiple of 256 bytes. Raises UnsupportedFormat."""
    book = RuleBook(rules)
    specs, offset = [], 0
    for tensor in checkpoint.tensors:
        dtype = book.resolve(tensor.name, tensor.dtype)
        nbytes = nbytes_of(dtype, tensor.shape)
        specs.append(TensorSpec(tensor.name, tensor.dtype, dtype, tensor.shape, 0, offset, nbytes))
        offset = aligned(offset + nbytes)
    return Layout(tuple(specs), max(offset, 1))


def load(
    checkpoint: Checkpoint, layout: Layout, rung: Rung, progress: Progress, pace: Pace | None = None
) -> LoadedSegment:
    """Read the file once into a new, frozen segment; nothing is left behind on failure.

    Raises OutOfSharedMemory (before the file is opened, where the room is known to be short), ModelNotFound,
    SourceChanged, or what ``progress`` raises.
    """
    segment = rung.allocate(layout.nbytes)
    try:
        pace = (pace or Pace.on(rung.device)).for_file(checkpoint.source.size)
        blocks = cut(checkpoint, layout.specs, pace.block_nbytes)
        digest = _stream(checkpoint.source, blocks, segment, rung.staging, pace, progress)
        segment.freeze()
    except BaseException:
        segment.free()
        raise
    return LoadedSegment(segment, digest)


def digest(checkpoint: Checkpoint, progress: Progress) -> str:
    """BLAKE3 of the whole file, as ``b3sum`` prints it. Raises like :func:`load`."""
    size = checkpoint.source.size
    pace = Pace.on(CPU).for_file(size)
    return _stream(checkpoint.source, cut_plainly(size, pace.block_nbytes), None, plain_staging, pace, progress)


def _stream(
    source: Source,
    blocks: Iterator[Block],
    segment: Segment | None,
    staging: Callable[[int], AbstractContextManager[memoryview]],
    pace: Pace,
    progress: Progress,
) -> str:
    """Move every block and return the digest of the file. No thread and no view of a buffer is left afterwards."""
    hasher = blake3(max_threads=pace.digesters)
    done = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_source(source))
        buffers = [stack.enter_context(staging(pace.block_nbytes)) for _ in range(pace.buffers)]

        def fill(block: Block, buffer: memoryview) -> None:
            with buffer[: block.nbytes] as data:
                file.read(block.start, data)
                if segment is not None:
                    for write in block.writes:
                        _place(segment, write, data)

        def take(block: Block, buffer: memoryview) -> None:
            nonlocal done
            with buffer[: block.nbytes] as data:
                hasher.update(data)
            done += block.nbytes
            progress(done, source.size)

        file.refuse_change()
        Ring(blocks, buffers, pace.readers, fill).run(take)
        file.refuse_change()
    return hasher.hexdigest()


def _place(segment: Segment, write: Write, block: memoryview) -> None:
    with block[write.start : write.start + write.nbytes] as data:
        if not write.converts:
            segment.write(write.offset, data)
            return
        from lunashm.views import convert  # noqa: PLC0415 - torch is 0.3 GB; a host that converts nothing needs none of it

        aligned_data = data if write.start % ITEMSIZE[write.stored] == 0 else bytearray(data)
        segment.write(write.offset, convert(aligned_data, write.stored, write.dtype))
